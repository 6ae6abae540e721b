"""One process at a time in a folder: two jobs would replace each other's files."""

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

LOCK = "lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What `flock` answers on file systems without locks, such as Lustre mounted without `-o flock`."""


class FolderLock:
    """`flock` on <folder>/lock, which says who holds it: host, process, job and since when.

    The kernel drops it when the process ends, however it ends, so none is ever stale. notes: what the user must know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / LOCK
        self.descriptor: int | None = None
        self.notes: list[str] = []

    def take(self) -> str:
        """Make the folder where it is missing and lock it. Returns who has it; nothing when it is ours now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_in_place():  # whoever had it unlinked it between our open and our flock
                self._close()
                return self.take()
        except BlockingIOError:
            self._close()
            return self._holder()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.notes.append(
                f"warning: the file system of {self.folder} has no locks ({error.strerror}), "
                "so nothing keeps a second job out"
            )
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps(_myself()).encode())
        return ""

    def release(self) -> None:
        """Let the next job in. The file stays: a job that waits for it must not wait for a file that was unlinked."""
        if self.descriptor is not None:
            os.ftruncate(self.descriptor, 0)
            self._close()

    def _close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def _is_in_place(self) -> bool:
        assert self.descriptor is not None
        try:
            return os.path.samestat(os.fstat(self.descriptor), self.file.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            holder = json.loads(self.file.read_text())
            job = f" (SLURM job {holder['job']})" if holder["job"] else ""
            return f"process {holder['pid']} on {holder['host']}{job} since {holder['since']}"
        except (OSError, ValueError, LookupError, TypeError):  # just taken, not yet written
            return "another job"


def _myself() -> dict[str, str | int | None]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }
