"""Parts of a corpus: encoded documents on disk, valid only with the record that is written last; and how they join."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemohybrid.data.index import LENGTH_DTYPE, LONGEST_DOCUMENT, flush_to_disk, token_dtype, write_index
from nemohybrid.data.text import Damage, Document
from nemohybrid.data.tokenizer import Tokenizer

DAMAGES_KEPT = 5
RECORD, TOKENS, LENGTHS = ".json", ".bin", ".lengths"


class StoppedAt(Exception):
    """A document that cannot be part of the corpus. place: as of a Document."""

    def __init__(self, place: int, reason: str):
        super().__init__(place, reason)
        self.place, self.reason = place, reason


@dataclass
class Part:
    """What one part holds. unknown_tokens: written where the tokenizer has no id for the text.

    damages: place and reason of the first documents that were left out because they cannot be read.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    damaged: int = 0
    unknown_tokens: int = 0
    token_bytes: int = 0
    damages: Sequence[tuple[int, str]] = ()

    def save(self, stem: Path) -> None:
        """Write `<stem>.json`, which makes the part valid."""
        with _Replacing(stem, RECORD) as file:
            file.write(json.dumps(asdict(self)).encode("utf-8"))

    @classmethod
    def load(cls, stem: Path) -> "Part | None":
        """The part at `stem`; None unless it is there and its files have the sizes that they were given."""
        try:
            part = cls(**json.loads(_file(stem, RECORD).read_bytes()))
            sizes = (_file(stem, TOKENS).stat().st_size, _file(stem, LENGTHS).stat().st_size)
        except (OSError, ValueError, TypeError):
            return None
        return part if sizes == (part.token_bytes, LENGTH_DTYPE.itemsize * part.documents) else None

    def lengths(self, stem: Path) -> NDArray[np.int32]:
        """[documents] tokens of each, eod included."""
        return np.fromfile(_file(stem, LENGTHS), dtype=LENGTH_DTYPE)


def write_part(
    documents: Iterable[Document | Damage],
    stem: Path,
    tokenizer: Tokenizer,
    skip_damaged: bool = False,
    advance: Callable[[int], object] = lambda file_bytes: None,
) -> Part:
    """Encode documents into the part at `stem`: each ended by eod, empty ones left out.

    advance: told the `file_bytes` of each. Raises StoppedAt at the first damage, unless they are skipped, and at an id
    that does not fit the vocabulary; the part is not valid then.
    """
    part, dtype, damages = Part(), token_dtype(tokenizer.vocab_size), []
    with ExitStack() as stack:
        tokens = stack.enter_context(_Replacing(stem, TOKENS))
        lengths = stack.enter_context(_Replacing(stem, LENGTHS))
        for document in documents:
            if isinstance(document, Damage):
                _note_damage(document, part, damages, skip_damaged)
            elif not document.text:
                part.empty += 1
            else:
                ids = encode_document(document, tokenizer)
                tokens.write(ids.astype(dtype).tobytes())
                lengths.write(np.array([len(ids)], dtype=LENGTH_DTYPE).tobytes())
                _count(part, document, ids, tokenizer)
            advance(document.file_bytes)
    part.token_bytes, part.damages = part.tokens * dtype.itemsize, damages
    part.save(stem)
    return part


def join_parts(parts: Sequence[tuple[Path, Part]], prefix: Path, dtype: np.dtype) -> None:
    """Write `<prefix>.bin` and `.idx`: all parts in order. Memory holds the lengths of one part at a time."""
    with Path(f"{prefix}.bin").open("wb") as joined:
        for stem, _ in parts:
            with _file(stem, TOKENS).open("rb") as tokens:
                shutil.copyfileobj(tokens, joined, 2**20)
        flush_to_disk(joined)
    write_index(Path(f"{prefix}.idx"), dtype, lambda: (part.lengths(stem) for stem, part in parts))


def encode_document(document: Document, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """[n + 1] the ids of a document and eod. Raises StoppedAt for an id outside the vocabulary, and for too many."""
    ids = np.array([*tokenizer.encode(document.text), tokenizer.eod], dtype=np.int64)
    # numpy would wrap an id that is too large into another, legal one
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise StoppedAt(document.place, f"token id {worst} does not fit. Legal: 0 to {tokenizer.vocab_size - 1}")
    if len(ids) > LONGEST_DOCUMENT:
        raise StoppedAt(document.place, f"a document of {len(ids):,} tokens. Legal: {LONGEST_DOCUMENT:,}; --separator")
    return ids


def _note_damage(damage: Damage, part: Part, damages: list[tuple[int, str]], skip: bool) -> None:
    if not skip:
        raise StoppedAt(damage.place, damage.reason)
    part.damaged += 1
    if len(damages) < DAMAGES_KEPT:
        damages.append((damage.place, damage.reason))


def _count(part: Part, document: Document, ids: NDArray[np.int64], tokenizer: Tokenizer) -> None:
    part.documents += 1
    part.tokens += len(ids)
    part.text_bytes += len(document.text.encode("utf-8"))
    if tokenizer.unknown is not None:
        part.unknown_tokens += int((ids == tokenizer.unknown).sum())


class _Replacing:
    """Opens a file under another name, and gives it its own once all of it is on the disk; on an error, removes it."""

    def __init__(self, stem: Path, suffix: str):
        self.target = _file(stem, suffix)
        # A process that is being killed may not be gone yet when the next one begins.
        self.temporary = Path(f"{self.target}.{os.getpid()}.tmp")

    def __enter__(self) -> BinaryIO:
        self.file = self.temporary.open("wb")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            with self.file:
                if kind is None:
                    flush_to_disk(self.file)
            if kind is None:
                self.temporary.replace(self.target)
        finally:
            self.temporary.unlink(missing_ok=True)


def _file(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
