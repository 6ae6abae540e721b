"""Deleting old checkpoints without ever deleting the last good one."""

from pathlib import Path

import torch.distributed as dist

from nemohybrid.checkpoint.files import explained
from nemohybrid.checkpoint.folders import find_checkpoints, withdraw
from nemohybrid.checkpoint.load import damage
from nemohybrid.checkpoint.manifest import inspect
from nemohybrid.checkpoint.world import World
from nemohybrid.errors import CheckpointError


def prune(root: Path, keep: int, process_group: dist.ProcessGroup | None = None) -> list[Path]:
    """Delete what is older than the newest `keep` complete checkpoints under `root`; returns what was deleted.

    Collective. Complete means that the manifest and all files are there in full length. Since hashes are not part of
    that, the newest checkpoint whose hashes hold is looked for as well (mostly the one just written, still in
    memory) and kept in any case; where none holds, nothing is deleted. A damaged checkpoint among those kept stays
    for you to look at. Raises CheckpointError when `keep` is less than 1 or a folder cannot be deleted.
    """
    if keep < 1:
        raise CheckpointError(f"cannot keep {keep} checkpoints: keep at least 1")
    world, root = World(process_group), Path(root)
    folders = world.on_first(lambda: find_checkpoints(root))
    surplus = world.on_first(lambda: older_than_newest(folders, keep))
    if not surplus:
        return []
    sound = next((folder for folder in folders if damage(folder, world) is None), None)
    doomed = [folder for folder in surplus if folder != sound] if sound else []
    world.on_first(lambda: delete(doomed))
    return doomed


def older_than_newest(folders: list[Path], keep: int) -> list[Path]:
    """What comes after the `keep`-th complete one of `folders`, which are sorted newest first."""
    complete = 0
    for position, folder in enumerate(folders):
        complete += looks_complete(folder)
        if complete == keep:
            return folders[position + 1 :]
    return []


def looks_complete(folder: Path) -> bool:
    """Whether manifest and files are there in full length; the files are not read."""
    try:
        with explained(f"looking at {folder}"):
            inspect(folder)
    except CheckpointError:
        return False
    return True


def delete(folders: list[Path]) -> None:
    """Delete checkpoints, oldest first."""
    for folder in reversed(folders):
        with explained(f"deleting {folder}"):
            withdraw(folder)
