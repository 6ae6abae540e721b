"""Reading a corpus: Megatron's `.bin` and `.idx`.

`.idx` (megatron-core 0.16, `indexed_dataset.py`): magic, version, token type, number of sequences and of document
marks, then int32 lengths, int64 byte offsets, int64 document marks. `.bin` holds the token ids and nothing else.
"""

import copy
import functools
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemohybrid.data._megatron import megatron
from nemohybrid.data.info import CorpusInfo
from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import DataError, did_you_mean

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK_BYTES = 16, 16_384
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # token type code -> bytes of one id; 6 and 7 are floats


class Corpus:
    """Token ids of a `.bin/.idx` pair, or of a part of its sequences. Every array it returns is a copy and outlives it.

    prefix: the path without `.bin` or `.idx`. Raises DataError when a file is missing or the two do not fit.
    """

    def __init__(self, prefix: str | Path):
        check_files(prefix)
        self.prefix = str(prefix)
        self.dataset = megatron("indexed_dataset").IndexedDataset(self.prefix)
        self.sequences = range(len(self.dataset))  # the entries of the index that count

    def part(self, sequences: range) -> "Corpus":
        """Some neighbouring entries of the index as a corpus of their own; the open files are shared."""
        part = copy.copy(self)
        for cached in ("num_tokens", "starts"):
            part.__dict__.pop(cached, None)
        part.sequences = sequences
        return part

    @functools.cached_property
    def num_tokens(self) -> int:
        """Token ids in all documents, eod included."""
        return int(self._lengths.sum(dtype=np.int64))

    @property
    def num_sequences(self) -> int:
        """Entries of the index; the same as documents unless a Megatron tool wrote several to a document."""
        return len(self.sequences)

    @property
    def num_documents(self) -> int:
        """Documents, as the index marks them; of a part, those that begin in it."""
        first, last = np.searchsorted(self.dataset.document_indices[:-1], [self.sequences.start, self.sequences.stop])
        return int(last - first)

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """[sequences + 1] where each sequence begins, counted in tokens, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])

    @property
    def _lengths(self) -> NDArray[np.int32]:
        return self.dataset.sequence_lengths[self.sequences.start : self.sequences.stop]

    @functools.cached_property
    def info(self) -> CorpusInfo | None:
        """What `<prefix>.json` says; None for a corpus of other tools, which has none. Raises DataError if damaged."""
        path = Path(f"{self.prefix}.json")
        return CorpusInfo.load(path) if path.is_file() else None

    def tokens(self, document: int) -> NDArray[np.int64]:
        """[n] the ids of one document, counted in the whole corpus; its eod included."""
        first, last = self.dataset.document_indices[document : document + 2]
        parts = [np.empty(0, dtype=np.int64), *(self.dataset.get(sequence) for sequence in range(first, last))]
        return np.concatenate(parts, dtype=np.int64)

    def document_of(self, sequence: int) -> int:
        """The number of the document that holds an entry of the index, both counted in the whole corpus."""
        return int(np.searchsorted(self.dataset.document_indices, sequence, side="right")) - 1

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start] the ids from `start` up to `stop`, counted through all documents in order."""
        assert 0 <= start <= stop <= self.num_tokens, f"[{start}, {stop}) of {self.num_tokens} tokens"
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = [np.empty(0, dtype=np.int64)]
        for sequence in range(first, self.num_sequences):
            if self.starts[sequence] >= stop:
                break
            skip = max(start - int(self.starts[sequence]), 0)
            length = min(stop, int(self.starts[sequence + 1])) - int(self.starts[sequence]) - skip
            # megatron returns a view of a file mapping that dies with the dataset; concatenate copies it
            parts.append(self.dataset.get(self.sequences[sequence], offset=skip, length=length))
        return np.concatenate(parts, dtype=np.int64)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises DataError when the corpus says that another tokenizer made it. Silent where it says nothing."""
        if self.info and self.info.tokenizer != tokenizer.description:
            raise DataError(
                f"{self.prefix} was prepared with the tokenizer {json.dumps(self.info.tokenizer)}, "
                f"but the run uses {json.dumps(tokenizer.description)}. Use that tokenizer or prepare the corpus again"
            )


def check_files(prefix: str | Path) -> None:
    """Raises DataError unless `<prefix>.idx` and `<prefix>.bin` exist and have the sizes that the index implies."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise DataError(f"{path} not found: a corpus is a pair of .bin and .idx{_suggest_prefix(prefix)}")
    index_bytes, data_bytes = _sizes_from_index(idx)
    if data_bytes == 0 == data.stat().st_size:
        raise DataError(f"{data} holds no tokens: the corpus is empty")
    for path, expected in ((idx, index_bytes), (data, data_bytes)):
        actual = path.stat().st_size
        if actual != expected:
            fault = "truncated" if actual < expected else "longer than its index says"
            raise DataError(f"{path} is {fault}: {actual:,} bytes, expected {expected:,}. Copy or prepare it again")


def fingerprint(prefix: str | Path) -> str:
    """32 hexadecimal digits that follow the content of a corpus and not its place or time.

    They cover the sizes of `.idx` and `.bin` and 16 blocks of 16 KiB of each, evenly spread from the first byte to the
    last: all of a small file. A few tokens changed between the blocks of a large one go unseen.
    """
    digest = hashlib.sha256()
    for end in (".idx", ".bin"):
        with Path(f"{prefix}{end}").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for block in range(FINGERPRINT_BLOCKS):
                file.seek(block * max(size - FINGERPRINT_BLOCK_BYTES, 0) // (FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def _sizes_from_index(idx: Path) -> tuple[int, int]:
    """The bytes that the `.idx` and the `.bin` must have, read from the head of the index and its last entries."""
    with idx.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise DataError(f"{idx} is truncated: {len(head)} bytes, the header alone has {HEADER.size}")
        magic, version, code, sequences, marks = HEADER.unpack(head)
        if magic != MAGIC or version != 1 or code not in TOKEN_BYTES:
            raise DataError(f"{idx} is not the index of a Megatron token corpus (version 1, integer ids)")
        if sequences == 0:
            raise DataError(f"{idx} lists no documents: the corpus is empty")
        index_bytes = HEADER.size + 12 * sequences + 8 * marks
        if idx.stat().st_size < index_bytes:
            return index_bytes, 0
        file.seek(HEADER.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", file.read(4))
        file.seek(HEADER.size + 12 * sequences - 8)
        (last_offset,) = struct.unpack("<q", file.read(8))
    return index_bytes, last_offset + last_length * TOKEN_BYTES[code]


def _suggest_prefix(prefix: str | Path) -> str:
    wanted = Path(prefix)
    if wanted.suffix in (".bin", ".idx", ".json"):
        return f". Name it without the suffix: {wanted.with_suffix('')}"
    return did_you_mean(wanted.name, [path.name.removesuffix(".idx") for path in wanted.parent.glob("*.idx")])
