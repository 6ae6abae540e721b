"""What a corpus is, and what any of its documents says: `nemohybrid data inspect`."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.info import CorpusInfo
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer
from nemohybrid.errors import DataError

FIRST_DOCUMENTS = 3
FIRST_TOKENS = 64
FIRST_CHARACTERS = 72


def tokenizer_of_corpus(corpus: Corpus, spec: str | None = None) -> Tokenizer | None:
    """The one that `spec` names, or `<prefix>.tokenizer`, or None. Raises DataError when another made the corpus."""
    beside = Path(f"{corpus.prefix}.tokenizer")
    if spec is None and beside.is_dir():
        spec = str(beside)
    elif spec is None and corpus.info and corpus.info.tokenizer.get("type") == "byte":
        spec = "byte"
    if spec is None:
        return None
    tokenizer = load_tokenizer(spec)
    corpus.check_tokenizer(tokenizer)
    return tokenizer


def describe(corpus: Corpus, tokenizer: Tokenizer | None) -> str:
    """Counts, types, sources, and how the first documents begin: as text, or as ids without a tokenizer."""
    return "\n".join([*_counts(corpus), *_record(corpus.info), *_beginnings(corpus, tokenizer)])


def show_document(corpus: Corpus, number: int, tokenizer: Tokenizer | None) -> str:
    """A line about document `number`, negative ones counted from the end, and its text, or its ids without a tokenizer.

    Raises DataError when there is no such document, or its ids are not those of the tokenizer.
    """
    index = document_index(corpus, number)
    ids = corpus.tokens(index)
    return f"document {index:,}: {len(ids):,} tokens\n{_shown(ids, index, tokenizer)}"


def document_index(corpus: Corpus, number: int) -> int:
    """`number`, negative ones counted from the end. Raises DataError when there is no such document."""
    count = corpus.num_documents
    if not -count <= number < count:
        raise DataError(f"{corpus.prefix} has no document {number}. Legal: 0 to {count - 1}, or {-count} to -1")
    return number % count


def _counts(corpus: Corpus) -> Iterator[str]:
    lengths = _document_lengths(corpus)
    dtype = np.dtype(corpus.dataset.index.dtype)
    sequences = "" if corpus.num_sequences == corpus.num_documents else f" in {corpus.num_sequences:,} sequences"
    yield f"{corpus.prefix}: {corpus.num_documents:,} documents{sequences}, {corpus.num_tokens:,} tokens"
    yield f"  token ids: {dtype.name}, {corpus.num_tokens * dtype.itemsize:,} bytes"
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())
    yield f"  shortest document: {shortest:,}, {lengths[shortest]:,} tokens"
    yield f"  longest document: {longest:,}, {lengths[longest]:,} tokens"


def _document_lengths(corpus: Corpus) -> NDArray[np.int64]:
    """[documents] tokens of each, eod included."""
    return np.diff(corpus.starts[corpus.dataset.document_indices])


def _record(info: CorpusInfo | None) -> Iterator[str]:
    if info is None:
        yield "  no .json beside it: made by another tool"
        return
    yield f"  text: {info.text_bytes:,} bytes, {info.text_bytes / info.tokens:.2f} to a token"
    yield f"  left out: {info.empty_documents_skipped:,} empty, {info.damaged_documents_skipped:,} damaged documents"
    if info.unknown_tokens:
        yield f"  unknown: {info.unknown_tokens:,} tokens stand for text that the tokenizer cannot spell"
    yield f"  tokenizer: {json.dumps(info.tokenizer)}"
    for source in info.sources:
        yield f"  source: {printable(str(source['name']))}, {source['bytes']:,} bytes"


def _beginnings(corpus: Corpus, tokenizer: Tokenizer | None) -> Iterator[str]:
    if tokenizer is None:
        yield "  ids of the first documents (no tokenizer was given or lies beside the corpus):"
    for index in range(min(FIRST_DOCUMENTS, corpus.num_documents)):
        shown = _shown(corpus.tokens(index)[:FIRST_TOKENS], index, tokenizer)
        beginning = printable(shown[:FIRST_CHARACTERS])
        yield f"  document {index} begins: {json.dumps(beginning, ensure_ascii=False) if tokenizer else beginning}"


def printable(text: str) -> str:
    """What could command a terminal (escapes, changes of direction) is spelled out; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _shown(ids: NDArray[np.int64], index: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    try:
        return tokenizer.decode(ids.tolist())
    except DataError as error:
        raise DataError(f"document {index}: {error}. The corpus was made with another tokenizer") from None
