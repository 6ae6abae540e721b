"""Names of the folders under a checkpoint root, and which of them count.

step_00000020            a published checkpoint: it appeared by one rename and is whole unless damaged later
.replaced-step_00000020  the former checkpoint of a step that is being written again; counts until the new one is there
.tmp-...                 being written or being deleted; never counts
"""

import re
from pathlib import Path

from nemohybrid.checkpoint.files import remove_tree, sync_folder

TEMPORARY = ".tmp-"
REPLACED = ".replaced-"
STEP_FOLDER = re.compile(rf"(?:{re.escape(REPLACED)})?step_(\d{{8,}})")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is published."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step a folder's name stands for, None for any other folder."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def temporary(folder: Path) -> Path:
    """Where `folder` is built before it is published, or emptied after it was withdrawn."""
    return folder.with_name(TEMPORARY + folder.name)


def replaced(folder: Path) -> Path:
    """Where the former checkpoint of the same step waits while the new one is published."""
    return folder.with_name(REPLACED + folder.name)


def find_checkpoints(root: Path) -> list[Path]:
    """Published checkpoints under `root`, newest step first; an absent root has none. Nothing is verified."""
    if not root.is_dir():
        return []
    # Sorted by name first, so that a published folder wins over the `.replaced-` one of its step.
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.name)
    by_step = {step: path for path in folders if (step := step_of(path)) is not None}
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def publish(temp: Path, final: Path) -> None:
    """Make the finished folder `temp` appear as `final`, durably, in place of one that may be there.

    A folder cannot replace a folder in one step, so the old one steps aside under a name that
    `find_checkpoints` still counts: at every moment one whole checkpoint of the step is found.
    """
    sync_folder(temp)
    if final.exists():
        final.replace(replaced(final))
    temp.replace(final)
    sync_folder(final.parent)
    remove_tree(replaced(final))


def withdraw(folder: Path) -> None:
    """Delete a checkpoint so that it is never seen half deleted: it loses its name first."""
    temp = temporary(folder)
    remove_tree(temp)
    folder.replace(temp)
    sync_folder(folder.parent)
    remove_tree(temp)


def sweep_leftovers(root: Path) -> None:
    """Remove what runs that died while writing or deleting left under `root`.

    Call it only where no other run writes to `root`. A replaced checkpoint whose successor never
    appeared gets its name back.
    """
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.name.startswith(TEMPORARY):
            remove_tree(path)
        elif path.name.startswith(REPLACED) and step_of(path) is not None:
            final = path.with_name(path.name.removeprefix(REPLACED))
            if final.exists():
                remove_tree(path)
            else:
                path.replace(final)
