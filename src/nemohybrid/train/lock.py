"""One job at a time in a run folder: two would replace and prune each other's checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemohybrid.checkpoint.world import World
from nemohybrid.errors import TrainingError
from nemohybrid.locking import FolderLock


@contextmanager
def only_job_in(folder: Path) -> Iterator[list[str]]:
    """Keep `folder`, made where it is missing, for this job while the block runs. Collective; rank 0 holds the lock.

    Yields what the user must know. Raises TrainingError on every rank where another job holds the folder, which is left
    as it was.
    """
    lock = FolderLock(folder)
    if holder := World().on_first(lock.take):
        raise TrainingError(f"run folder {folder} is in use by {holder}. Wait for it, or give another run.dir")
    try:
        yield lock.notes
    finally:
        lock.release()
