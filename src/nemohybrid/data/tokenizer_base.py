"""What a tokenizer is: text to token ids and back, exactly, with the bytes each id stands for.

Every tokenizer here is a table of byte strings, one for each id. Decoding joins entries, streaming decodes that join
as it grows, and bits per byte divide by the lengths: one table, so the three can never disagree.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemohybrid.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


class Tokenizer(ABC):
    """Text <-> token ids.

    table: the bytes each id stands for; control tokens stand for none. eod: the id that ends every document.
    document_prefix: what `encode` puts in front of a text, so that its first word looks like any other: a space, or
    nothing. unknown: the id of whatever the vocabulary cannot spell, None where it can spell everything.
    """

    def __init__(
        self, table: Sequence[bytes], eod: int, document_prefix: bytes = b"", unknown: int | None = None
    ) -> None:
        self.table = tuple(table)
        self.eod = eod
        self.document_prefix = document_prefix
        self.unknown = unknown

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a control token: a text that spells one out gets ordinary ids."""

    @property
    @abstractmethod
    def description(self) -> dict[str, str | int]:
        """What tells two tokenizers apart: equal descriptions give equal ids for every text."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` reads back, creating `folder` if need be."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, eod and holes included: every id is below it."""
        return len(self.table)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that one id stands for. Raises DataError for an id outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise DataError(
                f"token id {token} is outside this tokenizer's vocabulary. Legal: 0 to {self.vocab_size - 1}"
            )
        return self.table[token]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Inverse of `encode`: `document_prefix` goes."""
        content = b"".join(map(self.bytes_of, ids)).removeprefix(self.document_prefix)
        return content.decode("utf-8", errors="replace")

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """The text of `ids` that follow others of the same document: a space in front of them is a space."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] number of UTF-8 bytes each id stands for; 0 for eod and other control tokens."""
        return np.array([len(entry) for entry in self.table], dtype=np.int64)

    def prefix_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] how many bytes of each id are `document_prefix`, where a document begins with that id."""
        length = len(self.document_prefix)
        return np.array([length * entry.startswith(self.document_prefix) for entry in self.table], dtype=np.int64)


def write_in(folder: str | Path, name: str, content: bytes) -> None:
    """Write a file, creating its folder if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / name).write_bytes(content)
