"""Documents out of text and jsonl files, each with the place it came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemohybrid.errors import DataError, did_you_mean

JSONL_SUFFIXES = (".jsonl", ".ndjson")


class Document(NamedTuple):
    """One document. where: file and line, for error messages. file_bytes: how much of the file it took."""

    text: str
    where: str
    file_bytes: int


def read_documents(path: Path, text_field: str = "text", separator: str | None = None) -> Iterator[Document]:
    """The documents of one file, in order.

    `.jsonl` and `.ndjson`: one JSON object a line, its text in `text_field`. Any other file is text: one document,
    or, with `separator`, one up to each line that is exactly `separator` (empty: up to each blank line).
    Raises DataError with file and line for what cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    if path.suffix in JSONL_SUFFIXES:
        return _jsonl_documents(path, text_field)
    if separator is not None:
        return _separated_documents(path, separator)
    return iter([Document(read_utf8(path), f"{path}, line 1", path.stat().st_size)])


def read_utf8(path: Path) -> str:
    """The text of a file, line ends untouched. Raises DataError with the line of the first byte that is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1, error) from None


def _jsonl_documents(path: Path, text_field: str) -> Iterator[Document]:
    for number, line, file_bytes in _lines(path):
        if not line.isspace():
            where = f"{path}, line {number}"
            yield Document(_text_of(line, text_field, where), where, file_bytes)


def _text_of(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON object but {type(record).__name__}")
    if text_field not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where}: no field {text_field!r}. Fields of this line: {found}{did_you_mean(text_field, record)}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is not text but {type(text).__name__}")
    _refuse_lone_surrogate(text, where)
    return text


def _refuse_lone_surrogate(text: str, where: str) -> None:
    """JSON can spell half a UTF-16 pair (`\\ud83d` alone), which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{where}: {half} at character {error.start} is half a surrogate pair, not a character"
        ) from None


def _separated_documents(path: Path, separator: str) -> Iterator[Document]:
    lines: list[str] = []
    start, file_bytes = 1, 0
    for number, line, line_bytes in _lines(path):
        file_bytes += line_bytes
        if line.rstrip("\r\n") != separator:
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield Document("".join(lines), f"{path}, line {start}", file_bytes)
            lines, file_bytes = [], 0
    if lines:
        yield Document("".join(lines), f"{path}, line {start}", file_bytes)


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(number from 1, line with its end, bytes) of each line; only a newline ends one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8"), len(line)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, error) from None


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8. Convert the file to UTF-8 first")
