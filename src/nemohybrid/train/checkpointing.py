"""Saving a run and taking it up again."""

from pathlib import Path
from typing import Any

import torch

from nemohybrid.checkpoint.folders import find_checkpoints, step_of
from nemohybrid.checkpoint.load import load_checkpoint, newest_complete, read_metadata, read_state
from nemohybrid.checkpoint.retention import prune
from nemohybrid.checkpoint.save import save_checkpoint
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml
from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import CheckpointError
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.optimizer import start_state
from nemohybrid.train.state import fixed_settings, random_states, restore_random_states, run_state, run_tensors


class Checkpointer:
    """The checkpoints of one run folder."""

    def __init__(self, config: RunConfig, context: ParallelContext, tokenizer: Tokenizer) -> None:
        self.config, self.context, self.tokenizer = config, context, tokenizer
        self.root = Path(config.run.dir) / "checkpoints"
        self.tokenizer_folder = Path(config.run.dir) / "tokenizer"

    def save(self, step: int, model: HybridModel, optimizer: torch.optim.Optimizer) -> Path:
        """Write everything the run is made of, then drop the oldest checkpoints beyond `checkpoint.keep`."""
        tensors = run_tensors(model, optimizer) | random_states(self.context.rank)
        state = run_state(step, self._fixed())
        extra: dict[str, Path | str | bytes] = {"config.yaml": config_yaml(self.config)}
        if self.context.is_main:
            self.tokenizer.save(self.tokenizer_folder)
            extra |= {file.name: file for file in self.tokenizer_folder.iterdir()}
        path = save_checkpoint(self.root, step, tensors, state, extra)
        prune(self.root, self.config.checkpoint.keep)
        return path

    def find(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what to tell the user about damaged ones. None: start from step 0."""
        if self.config.resume not in ("auto", "never"):
            path = Path(self.config.resume)
            self._check_is_newest_here(path)
            return path, []
        if self.config.resume == "never":
            if any(self.root.glob("step_*")):
                raise CheckpointError(
                    f"resume=never, but {self.root} has checkpoints. Give another run.dir, or resume=auto to go on"
                )
            return None, []
        newest = newest_complete(self.root)
        if newest is None:
            return None, []
        return newest.path, [f"damaged checkpoint {path}: {reason}" for path, reason in newest.skipped]

    def _check_is_newest_here(self, path: Path) -> None:
        """Going back below newer checkpoints would prune what is saved next, and `resume=auto` would take the old ones."""
        start = read_state(path)["step"]
        newer = [folder.name for folder in find_checkpoints(self.root) if (step_of(folder) or 0) > start]
        if newer:
            raise CheckpointError(
                f"{path} is at step {start}, but {self.root} has newer checkpoints: {', '.join(newer)}. "
                "Move those away, or give another run.dir"
            )

    def load(self, path: Path, model: HybridModel, optimizer: torch.optim.Optimizer) -> int:
        """Fill model and optimizer in place; returns the step they are at."""
        self._check_settings(path)
        start_state(optimizer, 0)
        saved = read_metadata(path)
        mine = {name: state for name, state in random_states(self.context.rank).items() if name in saved}
        state = load_checkpoint(path, run_tensors(model, optimizer) | mine, allow_unexpected=("random.",))
        restore_random_states(mine)
        start_state(optimizer, state["step"])
        return state["step"]

    def _fixed(self) -> dict[str, Any]:
        """The settings, and the tokenizer whose ids the weights have learnt."""
        ids = {f"tokenizer.{key}": value for key, value in self.tokenizer.description.items()}
        return fixed_settings(self.config.as_dict()) | ids

    def _check_settings(self, path: Path) -> None:
        then, now = read_state(path)["fixed"], self._fixed()
        changed = [f"  {k}: {then.get(k)} -> {now.get(k)}" for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
        if changed:
            listed = "\n".join(changed)
            raise CheckpointError(
                f"{path} belongs to a run with other settings, which cannot change on the way:\n{listed}\n"
                "Take them back, or give another run.dir."
            )
