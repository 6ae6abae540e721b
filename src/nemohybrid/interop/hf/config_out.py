"""Our configuration of a model -> `config.json`, for readers old and new; or a refusal that says what they do not have."""

from typing import Any

import torch

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.section import leaves
from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf.config_in import config_of, may_pad
from nemohybrid.interop.hf.fields import (
    BLOCK_OF_SYMBOL,
    FIELDS,
    FIXED,
    MODEL_TYPE,
    NOT_THERE,
    OF_THE_READER,
    OURS,
    OURS_ALONE,
)
from nemohybrid.interop.hf.special_ids import NO_IDS, SPECIAL_IDS, SpecialIds
from nemohybrid.symbols import parse_pattern

NO_FLOOR = 1e-30
"""`time_step_min` is a floor of the time steps in transformers; we have none. Zero would break its initialisation."""
DEFAULT_LENGTH = 8192


def config_json(
    config: ModelConfig, dtype: torch.dtype, ids: SpecialIds = NO_IDS, length: int = DEFAULT_LENGTH
) -> dict[str, Any]:
    """The content of `config.json` for weights stored in `dtype`.

    ids: of special tokens; length: of the sequences it was trained on (nothing here limits positions).
    Raises CheckpointError that lists every setting for which there is no field and no equivalent.
    """
    _refuse_what_is_not_there(config)
    name = str(dtype).removeprefix("torch.")
    settings = {key: value for key, _, value in leaves(config)}
    hf = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": name,
        "torch_dtype": name,  # the name of `dtype` before transformers 5
        **_layers(config),
        **{field.theirs: settings[field.ours] for field in FIELDS},
        **FIXED,
        "chunk_size": config.chunk_size or 128,
        "moe_shared_expert_intermediate_size": config.shared_expert_ffn_hidden_size or 1,
        "time_step_min": NO_FLOOR,
        "n_shared_experts": 1,
        "max_position_embeddings": length,
        **dict.fromkeys(SPECIAL_IDS),
        **ids,
    }
    plain = {key: value for key, _, value in leaves(config_of(hf, "", torch.float32))}
    left_out = OF_THE_READER if may_pad(config) else OF_THE_READER | {"vocab_multiple"}  # rows without meaning
    hf[OURS] = {key: value for key, value in settings.items() if value != plain[key] and key not in left_out}
    return hf


def _layers(config: ModelConfig) -> dict[str, Any]:
    """As text and as lists. Only blocks that are stored count as MTP layers there."""
    pattern = parse_pattern(config.pattern)
    stored = min(pattern.mtp_depth, 1) if config.mtp.repeat_block else pattern.mtp_depth
    fields: dict[str, Any] = {
        "hybrid_override_pattern": pattern.main,
        "layers_block_type": [BLOCK_OF_SYMBOL[symbol] for symbol in pattern.main],
        "num_hidden_layers": pattern.num_layers,
        "num_nextn_predict_layers": stored,
    }
    if stored:
        fields["mtp_hybrid_override_pattern"] = pattern.mtp
        fields["mtp_layers_block_type"] = [BLOCK_OF_SYMBOL[symbol] for symbol in pattern.mtp]
    return fields


def _refuse_what_is_not_there(config: ModelConfig) -> None:
    pattern = parse_pattern(config.pattern)
    strange = sorted(set(pattern.main + pattern.mtp) - set(BLOCK_OF_SYMBOL))
    faults = [f"  model.pattern: there is no layer {symbol!r}" for symbol in strange]
    expressed = OURS_ALONE | {field.ours for field in FIELDS}
    defaults = {key: value for key, _, value in leaves(ModelConfig())}
    for key, _, value in leaves(config):
        if key not in expressed and value != defaults[key]:
            faults.append(f"  model.{key}={value}: {NOT_THERE.get(key, 'there is no such setting')}")
    if faults:
        listed = "\n".join(faults)
        raise CheckpointError(f"this model cannot be written as Hugging Face's {MODEL_TYPE}:\n{listed}")
