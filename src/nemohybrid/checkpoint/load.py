"""Finding the newest sound checkpoint, and loading one in place under any layout."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from nemohybrid.checkpoint.files import explained
from nemohybrid.checkpoint.folders import find_checkpoints
from nemohybrid.checkpoint.manifest import read_listed, verify
from nemohybrid.checkpoint.metadata import TensorRecord, read_metadata
from nemohybrid.checkpoint.planner import PartsLoadPlanner, views_of
from nemohybrid.checkpoint.save import STATE, single_process_is_fine
from nemohybrid.checkpoint.storage import SafetensorsReader
from nemohybrid.checkpoint.world import World
from nemohybrid.errors import CheckpointError, did_you_mean
from nemohybrid.parallel.layout import Parts

LISTED_PROBLEMS = 20


class Newest(NamedTuple):
    """The newest sound checkpoint, and the damaged ones that were passed over, each with the reason."""

    path: Path
    skipped: list[tuple[Path, str]]


def newest_complete(root: Path, process_group: dist.ProcessGroup | None = None) -> Newest | None:
    """The newest checkpoint under `root` whose every byte is as it was written; None where there is none at all.

    Collective: the ranks share the reading and agree on the answer. Each damaged checkpoint that is passed over is
    named in `skipped`. Raises CheckpointError where there are checkpoints and none is sound: a run never
    starts from step 0 without being told to.
    """
    world, root = World(process_group), Path(root)
    skipped: list[tuple[Path, str]] = []
    for path in world.on_first(lambda: find_checkpoints(root)):
        reason = damage(path, world)
        if reason is None:
            return Newest(path, skipped)
        skipped.append((path, reason))
    if skipped:
        listed = "\n".join(f"  {path.name}: {reason}" for path, reason in skipped)
        raise CheckpointError(
            f"No checkpoint in {root} is sound:\n{listed}\n"
            "Restore one from a copy, or move this folder away to start from step 0."
        )
    return None


def damage(path: Path, world: World) -> str | None:
    """What is wrong with the files of a checkpoint, None where all are sound; collective, the files are shared out."""

    def look() -> str | None:
        try:
            verify(path, world.rank, world.size)
        except CheckpointError as error:
            return str(error)
        return None

    return next((reason for reason in world.gather(look) if reason is not None), None)


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor | Parts],
    *,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
    verify_files: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint folder `path`, and return its state.

    Collective like `save_checkpoint`. The tensors may be views, DTensors or `Parts` of another layout than the saved one,
    and on any device; they are written through. Names, global shapes and dtypes must be exactly those of the checkpoint,
    all ranks taken together, but for names that begin with one of
    - allow_missing: may be absent from the checkpoint; such a tensor keeps its values;
    - allow_unexpected: may be in the checkpoint without being asked for (`("optimizer.",)` loads a model alone).

    verify_files: check every file's hash first; leave it out only right after `newest_complete` has done so.
    Raises CheckpointError, before any tensor is touched, for a damaged checkpoint or one that does not fit.
    """
    world, path = World(process_group), Path(path)
    if verify_files and (reason := damage(path, world)):
        raise CheckpointError(reason)
    saved = world.together(lambda: read_metadata(path))
    asked = set().union(*world.gather(lambda: list(tensors)))
    world.together(lambda: check_fit(path, tensors, saved, asked, allow_missing, allow_unexpected))
    wanted = {name: tensor for name, tensor in tensors.items() if name in saved}
    with explained(f"loading {path}"), single_process_is_fine():
        reader, planner = SafetensorsReader(path), PartsLoadPlanner()
        load(wanted, storage_reader=reader, planner=planner, process_group=process_group)
    return world.together(lambda: read_state(path))


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint, checked against its hash."""
    return read_listed(Path(path), STATE)


def check_fit(
    path: Path,
    tensors: Mapping[str, Tensor | Parts],
    saved: Mapping[str, TensorRecord],
    asked: set[str],
    allow_missing: tuple[str, ...],
    allow_unexpected: tuple[str, ...],
) -> None:
    """CheckpointError that lists every name, shape and dtype that differs. `asked`: the names of all ranks."""
    missing = [name for name in tensors if name not in saved and not name.startswith(allow_missing)]
    unexpected = [name for name in sorted(saved) if name not in asked and not name.startswith(allow_unexpected)]
    problems = [f"{name} is not in the checkpoint{did_you_mean(name, unexpected)}" for name in missing]
    problems += [f"{name} is in the checkpoint and was not asked for" for name in unexpected]
    problems += [fault for name in tensors if name in saved and (fault := misfit(name, tensors[name], saved[name]))]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(f"{path} does not fit this model ({count}):\n{listed(problems)}")


def misfit(name: str, tensor: Tensor | Parts, record: TensorRecord) -> str | None:
    """Why a saved tensor cannot be copied into `tensor` as it is, or None."""
    views = views_of(name, tensor)
    if any(view.is_meta for view in views):
        return f"{name} is on the meta device: give it memory before loading"
    if tuple(tensor.shape) != record.shape:
        return f"{name} has shape {list(tensor.shape)} here and {list(record.shape)} in the checkpoint"
    if wrong := [view.dtype for view in views if view.dtype != record.dtype]:
        return f"{name} is {wrong[0]} here and {record.dtype} in the checkpoint"
    return None


def listed(problems: Iterable[str]) -> str:
    """The first problems, a line each, and how many more there are."""
    lines = [f"  {problem}" for problem in problems]
    more = [f"  ... and {len(lines) - LISTED_PROBLEMS} more"] if len(lines) > LISTED_PROBLEMS else []
    return "\n".join(lines[:LISTED_PROBLEMS] + more)
