"""The documents of one unit, whatever the file: plain, compressed, parquet."""

import codecs
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import zstandard

from nemohybrid.data.parquet import parquet_documents
from nemohybrid.data.text import Damage, Document, Line, jsonl_documents, text_documents
from nemohybrid.data.units import Unit
from nemohybrid.errors import DataError

LONGEST_WINDOW = 2**31  # of `zstd --long=31`, beyond what the library allows by itself
BLOCK_BYTES = 2**16
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


class Reading(NamedTuple):
    """How files become documents.

    text_field: field of jsonl, or column of parquet, that holds the text. separator: line that ends a document of
    plain text, empty for a blank one; None: a file is a document.
    """

    text_field: str = "text"
    separator: str | None = None


def read_unit(unit: Unit, reading: Reading) -> Iterator[Document | Damage]:
    """The documents of a unit in order, and what is damaged between them.

    `place` counts from the head of the file, but of a piece of plain jsonl from the first line that begins in it.
    Raises DataError with file and position when a compressed file or parquet breaks off or is damaged: nothing that
    follows could be trusted.
    """
    if unit.is_parquet:
        return parquet_documents(unit.path, unit.start, unit.stop, reading.text_field)
    lines = _decompressed_lines(unit) if unit.compression else _lines(unit)
    lines = lines if unit.start else _without_byte_order_mark(lines)
    if unit.is_jsonl:
        return jsonl_documents(lines, reading.text_field)
    return text_documents(lines, reading.separator)


def _without_byte_order_mark(lines: Iterator[Line]) -> Iterator[Line]:
    """Some editors put one in front of UTF-8 text, of which it is no part."""
    for line, line_bytes in itertools.islice(lines, 1):
        yield line.removeprefix(codecs.BOM_UTF8), line_bytes
    yield from lines


def _lines(unit: Unit) -> Iterator[Line]:
    """The lines that begin in [start, stop); only a newline ends one."""
    with unit.path.open("rb") as file:
        position = unit.start
        if position:  # the line that holds the byte in front began earlier: step over the rest of it
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < unit.stop and (line := file.readline()):
            position += len(line)
            yield line, len(line)


def _decompressed_lines(unit: Unit) -> Iterator[Line]:
    count = before = 0
    with unit.path.open("rb", buffering=0) as file:
        try:
            for line in _decompressed(file, unit):
                count, now = count + 1, file.tell()
                yield line, now - before
                before = now
        except DAMAGED as error:
            raise DataError(
                f"{unit.path}: truncated or damaged after line {count:,}, at byte {file.tell():,} of {unit.size:,}: "
                f"{error}. Fetch the file again"
            ) from None


def _decompressed(file: BinaryIO, unit: Unit) -> BinaryIO:
    if unit.size == 0:
        raise EOFError("a compressed file is never empty")
    if unit.compression == ".gz":
        return gzip.GzipFile(fileobj=file)  # pyright: ignore[reportReturnType]
    return io.BufferedReader(ZstdFile(file))


class ZstdFile(io.RawIOBase):
    """The content of a zstandard file of any number of frames. Reading raises EOFError where the last one breaks off.

    zstandard's own stream_reader takes a truncated file for a complete one.
    """

    def __init__(self, file: BinaryIO):
        self.blocks = _zstd_blocks(file)
        self.left = memoryview(b"")

    def readable(self) -> bool:
        """As io asks for it."""
        return True

    def readinto(self, buffer) -> int:
        """Fill `buffer` with what comes next, perhaps not to its end; 0 when nothing does."""
        while not self.left:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.left = memoryview(block)
        count = min(len(buffer), len(self.left))
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
    frame = None
    while compressed := file.read(BLOCK_BYTES):
        while compressed:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(compressed)
            compressed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame breaks off")
