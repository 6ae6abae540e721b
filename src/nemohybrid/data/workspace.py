"""`PREFIX.parts`: where a corpus grows until it is whole, and what a command that was cut short goes on from."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemohybrid.errors import DataError
from nemohybrid.locking import LOCK, FolderLock

JOINED = "joined"  # stem of the corpus before it gets its name


@contextmanager
def workspace(prefix: str | Path) -> Iterator[Path]:
    """The folder `<prefix>.parts`, for one process at a time. Removed when the work in it is done or came to nothing.

    Left as it is when an exception ends the work and parts are there to go on from.
    Raises DataError while another process has it.
    """
    folder = Path(f"{prefix}.parts")
    _refuse_folder_of_others(folder)
    lock = FolderLock(folder)
    if holder := lock.take():
        raise DataError(f"{prefix} is being written by {holder}. Wait for it, or choose another --output")
    try:
        yield folder
    except BaseException:
        _empty(folder, all_of_it=not _is_of_use(folder))
        raise
    else:
        _empty(folder, all_of_it=True)
    finally:
        with suppress(OSError):  # not empty: the parts stay; on NFS: the open lock does
            _remove_if_done(folder)
        lock.release()


def _refuse_folder_of_others(folder: Path) -> None:
    """What lies in the folder is deleted in the end, so it must be ours: only we put a lock there."""
    if folder.is_symlink() or (folder.exists() and not (folder / LOCK).is_file() and any(folder.iterdir())):
        raise DataError(f"{folder} was not made by `data prepare`, which would empty it. Choose another --output")


def _is_of_use(folder: Path) -> bool:
    """Whether a part, or a tokenizer that was trained, is complete in it."""
    return any(folder.glob("*.json")) or any(folder.glob("trained-*/"))


def _empty(folder: Path, all_of_it: bool) -> None:
    """Remove all but the lock, or only what is half done. The lock goes last: on NFS an open file keeps its folder."""
    for path in folder.iterdir():
        if path.name != LOCK and (all_of_it or path.suffix == ".tmp" or path.stem == JOINED):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_if_done(folder: Path) -> None:
    if [path.name for path in folder.iterdir()] in ([], [LOCK]):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
