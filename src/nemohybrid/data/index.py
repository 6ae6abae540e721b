"""Writing Megatron's `.idx` (megatron-core 0.16, `indexed_dataset.py`) without holding it in memory.

megatron's own builder keeps a Python list entry for each document, and importing it takes seconds.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemohybrid.data.corpus import HEADER, MAGIC

LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32
LENGTH_DTYPE = np.dtype("<i4")
MARKS_AT_ONCE = 2**20
TYPE_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 when the vocabulary is below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def write_index(path: Path, dtype: np.dtype, lengths: Callable[[], Iterable[NDArray[np.int32]]]) -> None:
    """Write the index of documents that follow each other in a `.bin` of `dtype`, one sequence to a document.

    lengths: gives, each time anew, the lengths of all documents in order, cut in arrays that fit into memory.
    """
    documents = sum(len(some) for some in lengths())
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, TYPE_CODES[dtype], documents, documents + 1))
        for some in lengths():
            file.write(some.astype(LENGTH_DTYPE).tobytes())
        for starts in _starts(lengths()):
            file.write((starts * dtype.itemsize).astype("<i8").tobytes())
        for first in range(0, documents + 1, MARKS_AT_ONCE):
            file.write(np.arange(first, min(first + MARKS_AT_ONCE, documents + 1), dtype="<i8").tobytes())
        flush_to_disk(file)


def flush_to_disk(file: BinaryIO) -> None:
    """Return once a crash of the machine can no longer undo what was written."""
    file.flush()
    os.fsync(file.fileno())


def _starts(lengths: Iterable[NDArray[np.int32]]) -> Iterator[NDArray[np.int64]]:
    """Tokens in front of each document."""
    position = 0
    for some in lengths:
        ends = position + np.cumsum(some, dtype=np.int64)
        yield ends - some
        position = int(ends[-1]) if len(ends) else position
