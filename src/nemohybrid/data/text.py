"""Documents out of lines of bytes: jsonl, and text with or without separators; what cannot be read is told apart."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nemohybrid.errors import DataError, did_you_mean

Line = tuple[bytes, int]  # a line with its end, and how much of its file it took


class Document(NamedTuple):
    """One document. place: the line or row where it starts, from 1. file_bytes: how much of the file it took."""

    text: str
    place: int
    file_bytes: int


class Damage(NamedTuple):
    """What stands where a document should. place: the line or row at fault, from 1. file_bytes: as of a Document."""

    reason: str
    place: int
    file_bytes: int


def jsonl_documents(lines: Iterable[Line], text_field: str) -> Iterator[Document | Damage]:
    """One JSON object a line, its text in `text_field`; blank lines are nothing."""
    for number, (line, file_bytes) in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            yield Document(_text_of(decode_utf8(line), text_field), number, file_bytes)
        except ValueError as error:
            yield Damage(str(error), number, file_bytes)


def text_documents(lines: Iterable[Line], separator: str | None) -> Iterator[Document | Damage]:
    """One document, or one up to each line that is exactly `separator` (empty: up to each blank line)."""
    marker = None if separator is None else separator.encode("utf-8")
    content, start, file_bytes = bytearray(), 1, 0
    for number, (line, line_bytes) in enumerate(lines, start=1):
        file_bytes += line_bytes
        if line.rstrip(b"\r\n") != marker:
            start = start if content else number
            content += line
        elif content:
            yield _text_document(content, start, file_bytes)
            content, file_bytes = bytearray(), 0
    if content or marker is None:
        yield _text_document(content, start, file_bytes)


def read_utf8(path: Path) -> str:
    """The text of a small file, line ends untouched. Raises DataError with the line of a byte that is not UTF-8."""
    content = path.read_bytes()
    try:
        return decode_utf8(content)
    except NotUtf8 as error:
        raise DataError(f"{path}, line {1 + error.lines_before}: {error}") from None


class NotUtf8(ValueError):
    """Bytes that are not UTF-8. lines_before: newlines in front of the first wrong byte."""

    def __init__(self, error: UnicodeDecodeError):
        self.lines_before = error.object.count(b"\n", 0, error.start)
        super().__init__(f"byte 0x{error.object[error.start]:02x} is not UTF-8. Convert the file to UTF-8 first")


def decode_utf8(content: bytes | bytearray) -> str:
    """Raises NotUtf8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUtf8(error) from None


def _text_document(content: bytearray, start: int, file_bytes: int) -> Document | Damage:
    try:
        return Document(decode_utf8(content), start, file_bytes)
    except NotUtf8 as error:
        return Damage(str(error), start + error.lines_before, file_bytes)


def _text_of(line: str, text_field: str) -> str:
    """Raises ValueError with the reason when the line is no object with text in `text_field`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    if text_field not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"no field {text_field!r}. Fields of this line: {found}{did_you_mean(text_field, record)}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is not text but {type(text).__name__}")
    _refuse_lone_surrogate(text)
    return text


def _refuse_lone_surrogate(text: str) -> None:
    """JSON can spell half a UTF-16 pair (`\\ud83d` alone), which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{half} at character {error.start} is half a surrogate pair, not a character") from None
