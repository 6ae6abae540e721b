"""Saving a run and taking it up again."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nemohybrid.checkpoint.folders import find_checkpoints, step_of
from nemohybrid.checkpoint.load import load_checkpoint, newest_complete, read_metadata, read_state
from nemohybrid.checkpoint.retention import prune
from nemohybrid.checkpoint.save import save_checkpoint
from nemohybrid.checkpoint.world import World
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml
from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import CheckpointError
from nemohybrid.model.count import built_parameters
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import Parts, held
from nemohybrid.precision.binding import PREFIX as SCALES
from nemohybrid.train.finite import all_finite
from nemohybrid.train.optimizer import MOMENTS
from nemohybrid.train.random_streams import PREFIX, RandomStreams
from nemohybrid.train.state import changed_settings, fixed_settings, run_state

_GIB = 2**30
_TOKENIZER = "tokenizer."


class Checkpointer:
    """The checkpoints of one run folder. `data`: what of the data must stay the same, dotted key -> JSON value."""

    def __init__(self, config: RunConfig, context: ParallelContext, tokenizer: Tokenizer, data: dict[str, Any]) -> None:
        self.config, self.context, self.tokenizer, self.data = config, context, tokenizer, data
        self.random = RandomStreams(context, config.run.seed)
        self.root = Path(config.run.dir) / "checkpoints"
        self.tokenizer_folder = Path(config.run.dir) / "tokenizer"

    def save(self, step: int, tensors: dict[str, Tensor | Parts]) -> Path:
        """Write everything the run is made of, then drop the oldest checkpoints beyond `checkpoint.keep`.

        tensors: this rank's part of model and optimizer.

        Raises CheckpointError on every rank when a weight or moment is not finite on any, or the disk fails.
        """
        World().together(lambda: check_finite(step, tensors))
        state = run_state(step, self._fixed(), self.random.layout)
        extra: dict[str, Path | str | bytes] = {"config.yaml": config_yaml(self.config)}
        World().on_first(lambda: self.tokenizer.save(self.tokenizer_folder))
        if self.context.is_main:
            extra |= {file.name: file for file in self.tokenizer_folder.iterdir()}
        path = save_checkpoint(self.root, step, tensors | self.random.states(), state, extra)
        prune(self.root, self.config.checkpoint.keep)
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint here, whether it is sound or not."""
        return next(iter(find_checkpoints(self.root)), None)

    def space_warnings(self) -> list[str]:
        """What to say when the disk has no room for the checkpoints that will lie there at a time."""
        size = sum(built_parameters(self.config.model).values()) * 4 * (1 + len(MOMENTS))
        at_a_time = (
            self.config.checkpoint.keep + 1 if self.config.checkpoint.every else 1
        )  # one more while it is written
        free = shutil.disk_usage(self.root.parent).free
        if free >= size * max(1, at_a_time - len(find_checkpoints(self.root))):
            return []
        return [
            f"warning: a checkpoint takes {size / _GIB:.2f} GiB, and up to {at_a_time} lie in {self.root} at a time, "
            f"but {free / _GIB:.2f} GiB are free"
        ]

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

    def load(self, path: Path, tensors: dict[str, Tensor | Parts]) -> int:
        """Fill this rank's part of model and optimizer in place, whoever saved them; returns the step they are at.

        Random streams go on where the ranks stand as they stood; else they are seeded anew from (seed, step). Delayed scaling
        begins anew where another recipe was saved.

        Raises CheckpointError when the checkpoint is damaged, of other settings, or beyond the end of this run.
        """
        saved = read_metadata(path)
        if not any(name.startswith("optimizer.") for name in saved):
            raise CheckpointError(
                f"{path} has weights and no optimizer state, so it cannot be resumed. Start a new run from it: "
                f"init_from={path}, with another run.dir"
            )
        self._check_end(path)
        self._check_settings(path)
        as_it_was = read_state(path).get("layout") == self.random.layout
        streams = {name: s for name, s in self.random.states().items() if as_it_was and name in saved}
        state = load_checkpoint(path, tensors | streams, allow_missing=(SCALES,), allow_unexpected=(PREFIX, SCALES))
        self.random.restore(streams) if streams else self.random.start(state["step"])
        return state["step"]

    def _fixed(self) -> dict[str, Any]:
        """The settings, the data, and the tokenizer whose ids the weights have learnt."""
        ids = {f"{_TOKENIZER}{key}": value for key, value in self.tokenizer.description.items()}
        return fixed_settings(self.config.as_dict()) | self.data | ids

    def _check_end(self, path: Path) -> None:
        """A run cannot end before it starts: the checkpoint would be cut short, or trained on with the wrong schedule."""
        step, train = read_state(path)["step"], self.config.train
        key, end = ("stop_at", train.stop_at) if train.stop_at else ("steps", train.steps)
        if step > end:
            raise CheckpointError(
                f"{path} is at step {step}, but train.{key}={end}. Legal: train.{key}={step + 1} or more, "
                "or another run.dir to start over"
            )

    def _check_settings(self, path: Path) -> None:
        then, now = read_state(path)["fixed"], self._fixed()
        changed = [line for line in changed_settings(then, now) if not line.startswith(_TOKENIZER)]
        changed += _changed_tokenizer(then, now)
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            raise CheckpointError(
                f"{path} belongs to a run with other settings, which cannot change on the way:\n{listed}\n"
                "Take them back, or give another run.dir."
            )


def check_finite(step: int, tensors: Mapping[str, Tensor | Parts]) -> None:
    """CheckpointError for a weight or moment that is not finite: a run must not be resumed from it."""
    if bad := next((name for name, tensor in tensors.items() if not all_finite(*held(tensor))), None):
        raise CheckpointError(
            f"step {step}: {bad} is no longer finite after the update, so nothing was saved. Lower optim.lr, "
            "then start the command again to go on from the newest checkpoint"
        )


def _changed_tokenizer(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for people: of two tokenizers of the same size, the hashes say nothing to them."""
    old, new = ({k: v for k, v in fixed.items() if k.startswith(_TOKENIZER)} for fixed in (then, now))
    if old == new:
        return []
    was, is_now = (f"{t.get('tokenizer.type')} with {t.get('tokenizer.vocab_size')} ids" for t in (old, new))
    return [f"tokenizer: {was} -> {'another ' if was == is_now else ''}{is_now}; every id would mean another text"]
