"""Writing a checkpoint: into a temporary folder, hashed into a manifest, published by one rename."""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from nemohybrid.checkpoint.files import FileEntry, copy_pieces, explained, remove_tree, write_file
from nemohybrid.checkpoint.folders import publish, step_folder, sweep_leftovers, temporary
from nemohybrid.checkpoint.manifest import MANIFEST, Manifest, inspect, is_file_name, write_manifest
from nemohybrid.checkpoint.metadata import DTYPE_NAMES, METADATA
from nemohybrid.checkpoint.planner import PartsSavePlanner, views_of
from nemohybrid.checkpoint.storage import SafetensorsWriter
from nemohybrid.checkpoint.world import World
from nemohybrid.errors import CheckpointError
from nemohybrid.parallel.layout import Parts

STATE = "state.json"
NO_EXTRA_FILES: Mapping[str, Path | str | bytes] = {}


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor | Parts],
    state: dict[str, Any],
    extra_files: Mapping[str, Path | str | bytes] = NO_EXTRA_FILES,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a checkpoint as `root/step_00000020` and return that folder; when this returns it is on the disk.

    Collective: every rank of `process_group` (default: the whole world, or this process alone) calls it with the
    same `step`, and `root` is a folder that all of them share.
    - tensors: logical name -> tensor of any shape, strides and device. A DTensor is saved as this rank's chunk of a
      global tensor. A plain tensor is taken to be the same on every rank that names it and is written once:
      what differs from rank to rank needs a name of its own on each. `Parts` are the boxes that this rank holds of a
      global tensor, none or many; a box that several ranks hold is written once, and all ranks' boxes together must
      be the tensor.
    - state: JSON values that come back exactly (finite floats included); rank 0's are written.
    - extra_files: file name -> file to copy, text, or bytes; rank 0's are written.

    A checkpoint that is already there for `step` is replaced, and counts until the new one is whole. Folders that
    dead runs left half written under `root` are removed. Raises CheckpointError on every rank when anything
    fails on any; the temporary folder is then removed and the older checkpoints are as they were.
    """
    world, root = World(process_group), Path(root)
    world.together(lambda: check_arguments(step, tensors, state, extra_files))
    final = step_folder(root, step)
    temp = temporary(final)
    try:
        world.on_first(lambda: make_temporary(temp))
        files = save_tensors(temp, tensors, process_group)
        world.on_first(lambda: complete(temp, final, step, files, state, extra_files))
    except BaseException:
        if world.rank == 0:  # DCP and World let every rank finish before any raises: nobody writes there now
            remove_tree(temp)
        raise
    return final


def make_temporary(temp: Path) -> None:
    """An empty folder to write into, after dead runs' leftovers are gone."""
    with explained(f"preparing {temp}"):
        temp.parent.mkdir(parents=True, exist_ok=True)
        sweep_leftovers(temp.parent)
        temp.mkdir()


def save_tensors(
    temp: Path, tensors: Mapping[str, Tensor | Parts], process_group: dist.ProcessGroup | None
) -> dict[str, FileEntry]:
    """Write all ranks' tensors into `temp`; on rank 0, what was written."""
    writer = SafetensorsWriter(temp)
    with explained(f"writing {temp}"), single_process_is_fine():
        save(dict(tensors), storage_writer=writer, planner=PartsSavePlanner(), process_group=process_group)
    return writer.files


def complete(
    temp: Path,
    final: Path,
    step: int,
    files: dict[str, FileEntry],
    state: dict[str, Any],
    extra_files: Mapping[str, Path | str | bytes],
) -> None:
    """Add state, extra files and manifest to the tensors in `temp`, and publish it as `final`."""
    with explained(f"writing {final}"):
        contents = dict(extra_files) | {STATE: json.dumps(state, allow_nan=False, indent=1)}
        files = files | {name: write_file(temp / name, pieces_of(content)) for name, content in contents.items()}
        write_manifest(temp, Manifest(step, files))
        inspect(temp)  # a rank that wrote to a disk of its own is found here, not at the next resume
        publish(temp, final)


def pieces_of(content: Path | str | bytes) -> Iterable[bytes]:
    """The bytes of an extra file: a Path is copied, text is encoded."""
    if isinstance(content, Path):
        return copy_pieces(content)
    return [content.encode() if isinstance(content, str) else content]


def check_arguments(
    step: int,
    tensors: Mapping[str, Tensor | Parts],
    state: dict[str, Any],
    extra_files: Mapping[str, Path | str | bytes],
) -> None:
    """CheckpointError for anything that could not be saved, or not come back as it is."""
    if step < 0:
        raise CheckpointError(f"step {step}: a step is 0 or more")
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    check_json(state, "state")
    for name in extra_files:
        if not is_file_name(name) or name in (STATE, METADATA, MANIFEST) or name.endswith(".safetensors"):
            raise CheckpointError(
                f"extra file {name!r}: use letters, digits, '.', '_' and '-', and no name of the checkpoint's own"
            )


def check_tensor(name: str, tensor: Tensor | Parts) -> None:
    """CheckpointError unless `tensor` can be saved under `name`."""
    if not isinstance(name, str) or not name or "@" in name or name == "__metadata__":
        raise CheckpointError(f"tensor name {name!r}: use a non-empty text without '@'")
    if not isinstance(tensor, Tensor | Parts):
        raise CheckpointError(f"{name} is a {type(tensor).__name__}, no tensor: put it into the state instead")
    views = views_of(name, tensor)
    for view in views:
        if view.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name} has dtype {view.dtype}. Legal: {', '.join(map(str, DTYPE_NAMES))}")
        if view.layout != torch.strided or view.is_meta:
            raise CheckpointError(f"{name} is sparse or on the meta device: it has no plain values to save")
    if len(dtypes := sorted({str(view.dtype) for view in views})) > 1:
        raise CheckpointError(f"{name} has boxes of {' and of '.join(dtypes)}: a tensor has one dtype")


def check_json(value: Any, where: str) -> None:
    """CheckpointError, with the place, for a value that JSON would refuse or give back as something else."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: key {key!r} would come back as text; use text keys")
            check_json(child, f"{where}.{key}")
    elif isinstance(value, list):
        for position, child in enumerate(value):
            check_json(child, f"{where}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where} is {value}: a run must not be resumed from it")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, which JSON does not give back. Legal: dict, list, "
            "str, int, float, bool, None"
        )


@contextmanager
def single_process_is_fine() -> Iterator[None]:
    """Silences DCP's remark that torch.distributed is not initialised: one process is a world of one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
