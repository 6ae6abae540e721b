"""The C library's allocator, told to keep what a step frees: the next step takes the same again."""

import ctypes
import sys

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
