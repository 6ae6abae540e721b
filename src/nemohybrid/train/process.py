"""What a run asks of its process: to keep the memory that a step frees, and to open as many files as it may."""

import ctypes
import resource
import sys
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt(3)."""
KEEP_BYTES = 2**30
LARGEST_KEPT = 32 * 2**20
"""glibc takes no larger threshold; blocks above it are mapped and unmapped each time, as always."""


def keep_freed_memory() -> bool:
    """Keep up to a GiB of freed heap for the next step instead of giving it back; whether the C library has the option.

    By default glibc returns the heap after every step on a CPU and takes it again page by page: at quickstart size
    14,000 page faults a step. Neither results nor peak memory change. docs/benchmarks/cpu_peer.md has the figures.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEEP_BYTES) and mallopt(MMAP_THRESHOLD, LARGEST_KEPT))


def allow_many_files() -> None:
    """Raise the limit of open files to what the system allows: a corpus takes up to six, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a hard limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
