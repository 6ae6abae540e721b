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
        lock.release()
        with suppress(OSError):  # not empty: the parts stay
            _remove_if_done(folder)


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
