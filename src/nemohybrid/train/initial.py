"""Starting a run from weights that are there: `init_from`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nemohybrid.checkpoint.load import load_checkpoint
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves
from nemohybrid.config.yaml import read_config_yaml
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.data.tokenizer_base import MODEL_FILE, TOKENIZER_FILE, Tokenizer
from nemohybrid.errors import CheckpointError
from nemohybrid.generate.load import find_checkpoint
from nemohybrid.parallel.layout import Parts
from nemohybrid.precision.binding import PREFIX
from nemohybrid.symbols import parse_pattern
from nemohybrid.train.state import FREE_IN_MODEL, changed_settings

OF_TRAINING = ("init_std", "rescale_output_init", "dt_min", "dt_max", "dt_init_floor")
"""Beginnings of keys of `model` that may differ too where the same weights compute the same."""


def load_initial_weights(config: RunConfig, tensors: Mapping[str, Tensor | Parts], tokenizer: Tokenizer) -> list[str]:
    """Fill this rank's part of the model from what `init_from` names; step and optimizer stay those of a new run.

    Returns what to say of it. Raises CheckpointError where tensors, settings that change what they compute, or the tokenizer
    differ. Collective.
    """
    if config.init_from is None:
        return []
    named = Path(config.init_from)
    checkpoint = find_checkpoint(named)
    _check_same_model(checkpoint, config.model)
    _check_same_tokenizer(checkpoint, tokenizer)
    others = ("optimizer.", "random.", PREFIX)
    load_checkpoint(checkpoint, tensors, allow_unexpected=others, verify_files=checkpoint == named)
    return [f"starting from the weights of {checkpoint}, with a new optimizer at step 0"]


def _check_same_model(checkpoint: Path, now: ModelConfig) -> None:
    then = read_config_yaml(checkpoint / "config.yaml").model
    if changed := changed_settings(_computing(then), _computing(now)):
        listed = "\n".join(f"  {line}" for line in changed)
        raise CheckpointError(
            f"the weights of {checkpoint} belong to another model:\n{listed}\n"
            "Without model=NAME and model.* on the command line, init_from brings the settings of its weights along."
        )


def settings_of_weights(model: ModelConfig) -> dict[str, Any]:
    """Key of `model` -> value, of the settings that decide which weights there are and what they compute."""
    return {key: value for key, _, value in leaves(model) if not key.startswith((*FREE_IN_MODEL, *OF_TRAINING))}


def stored_layers(text: str, repeats: bool) -> dict[str, Any]:
    """What of a pattern weights know: not the pipeline cuts, nor how often a repeated MTP block is run."""
    pattern = parse_pattern(text)
    blocks = min(pattern.mtp_depth, 1) if repeats else pattern.mtp_depth
    return {"layers": pattern.main, "mtp_layers": pattern.mtp, "mtp_blocks": blocks}


def _computing(model: ModelConfig) -> dict[str, Any]:
    values = settings_of_weights(model) | stored_layers(model.pattern, model.mtp.repeat_block)
    del values["pattern"]
    return {f"model.{key}": value for key, value in values.items()}


def _check_same_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    if not any((checkpoint / name).is_file() for name in (TOKENIZER_FILE, MODEL_FILE)):
        return  # imported from a folder without one
    then = load_tokenizer(checkpoint)
    if then.description != tokenizer.description:
        raise CheckpointError(
            f"the weights of {checkpoint} have learnt the ids of another tokenizer ({then.vocab_size} ids, "
            f"here {tokenizer.vocab_size}); every id would mean another text. Prepare the corpus with theirs: "
            f"nemohybrid data prepare --tokenizer {checkpoint} ..."
        )
