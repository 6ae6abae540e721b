"""Text in, corpus out: encode documents and write `.bin`, `.idx` and `.json`, all or nothing."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nemohybrid.data._megatron import megatron
from nemohybrid.data.info import CorpusInfo
from nemohybrid.data.text import Document, read_documents
from nemohybrid.data.tokenizer import Tokenizer
from nemohybrid.errors import DataError

CORPUS_SUFFIXES = (".bin", ".idx", ".json")


def prepare(
    inputs: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    text_field: str = "text",
    separator: str | None = None,
) -> CorpusInfo:
    """Encode text and jsonl files into one corpus at `prefix`; an existing one is replaced once the new one is whole.

    Documents as `read_documents` finds them, in the order of `inputs`, with a progress bar on a terminal.
    Raises DataError with file and line for what cannot be read; nothing is left behind then.
    """
    per_file = [read_documents(path, text_field, separator) for path in inputs]
    sources: list[dict[str, str | int]] = [{"name": path.name, "bytes": path.stat().st_size} for path in inputs]
    total = sum(path.stat().st_size for path in inputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="prepare", disable=None) as bar:
        documents = (document for documents in per_file for document in documents)
        return write_corpus(_advancing(documents, bar), prefix, tokenizer, sources)


def write_corpus(
    documents: Iterable[Document], prefix: str | Path, tokenizer: Tokenizer, sources: list[dict[str, str | int]]
) -> CorpusInfo:
    """Write one corpus: every document encoded and ended by eod, empty ones left out.

    Token ids are uint16 when the vocabulary is below 65,500, else int32 (Megatron's rule). Written under temporary
    names and renamed, `.json` last. Raises DataError when there is no text or an id does not fit the vocabulary.
    """
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{prefix}.{uuid.uuid4().hex}.tmp"
    try:
        info = _write(documents, temporary, tokenizer, sources)
        _publish(temporary, prefix)
    finally:
        for suffix in CORPUS_SUFFIXES:
            Path(temporary + suffix).unlink(missing_ok=True)
    return info


def _write(
    documents: Iterable[Document], prefix: str, tokenizer: Tokenizer, sources: list[dict[str, str | int]]
) -> CorpusInfo:
    indexed = megatron("indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=indexed.DType.optimal_dtype(tokenizer.vocab_size))
    count = tokens = text_bytes = empty = 0
    try:
        for document in documents:
            if not document.text:
                empty += 1
                continue
            ids = encode_document(document, tokenizer)
            builder.add_document(ids, [len(ids)])
            count, tokens = count + 1, tokens + len(ids)
            text_bytes += len(document.text.encode("utf-8"))
    finally:
        builder.data_file.close()
    if count == 0:
        raise DataError("no text to prepare: every document is empty")
    builder.finalize(f"{prefix}.idx")
    info = CorpusInfo(tokenizer.description, count, tokens, text_bytes, empty, sources)
    info.save(Path(f"{prefix}.json"))
    return info


def encode_document(document: Document, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """[n + 1] the ids of a document and eod. Raises DataError for an id outside the tokenizer's vocabulary."""
    ids = np.array([*tokenizer.encode(document.text), tokenizer.eod], dtype=np.int64)
    # numpy would wrap an id that is too large into another, legal one
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(f"{document.where}: token id {worst} does not fit. Legal: 0 to {tokenizer.vocab_size - 1}")
    return ids


def _publish(temporary: str, prefix: str | Path) -> None:
    """Rename the three files into place. No old index or record ever stands beside new tokens."""
    for suffix in (".json", ".idx"):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    for suffix in CORPUS_SUFFIXES:
        Path(temporary + suffix).replace(f"{prefix}{suffix}")


def _advancing(documents: Iterable[Document], bar: tqdm) -> Iterator[Document]:
    for document in documents:
        yield document
        bar.update(document.file_bytes)
