"""Files that are on the disk when we say so: hashed from memory while they are written, flushed, fsynced."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from nemohybrid.errors import CheckpointError, NemohybridError

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """What a file must be: its size in bytes and the sha256 of its content, in hexadecimal."""

    size: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Write `pieces` one after the other into a new file and force them to the disk.

    The hash is taken from the memory that is written, never read back: what the disk made of it is
    for `manifest.verify` to find out. Raises FileExistsError, or the OSError of a failing disk.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for piece in pieces:
            digest.update(piece)
            stream.write(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(size, digest.hexdigest())


def copy_pieces(source: Path) -> Iterator[bytes]:
    """The content of `source` in pieces that are cheap to hold."""
    with source.open("rb") as stream:
        while piece := stream.read(COPY_BYTES):
            yield piece


def hash_file(path: Path) -> str:
    """sha256 of a file as it is on the disk now."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk; without this a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder as far as the disk lets us; what stays has a temporary name and is swept later."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn a disk's or a rank's failure inside the block into a CheckpointError that says what to do.

    `doing` completes "While ...". DCP hands every failure over in its own CheckpointException, which is
    no `Exception`: the first failing rank's error is taken out of it.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"While {doing}: {error}. {advice(error)}") from error
    except CheckpointException as failure:
        rank, (error, _) = min(failure.failures.items(), key=lambda item: item[0])
        if not isinstance(error, Exception):  # an interrupt stays an interrupt
            raise error from None
        text = str(error) if isinstance(error, NemohybridError) else f"{type(error).__name__}: {error}"
        hint = f" {advice(error)}" if isinstance(error, OSError) else ""
        raise CheckpointError(f"While {doing}, rank {rank}: {text}.{hint}") from error


def advice(error: OSError) -> str:
    """What a person can do about a failing disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space or keep fewer checkpoints, then start the same command again to resume."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Check who may write to this folder and that its disk is not mounted read-only."
    return "Check the storage, then start the same command again to resume from the newest complete checkpoint."
