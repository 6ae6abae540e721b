"""Input files cut into units: what one worker encodes at a time, and what a resumed command need not encode again."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemohybrid.data import parquet
from nemohybrid.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".zst")
UNIT_BYTES = 16 * 2**20
COUNT_BYTES = 2**20


class Unit(NamedTuple):
    """Bytes [start, stop) of plain jsonl, row groups [start, stop) of parquet, all bytes of any other file.

    A line of jsonl belongs to the unit in which it begins. file_bytes: how much of the file the unit takes.
    size and mtime_ns: of the whole file, which must not change while it is read.
    """

    path: Path
    size: int
    mtime_ns: int
    start: int
    stop: int
    file_bytes: int

    @property
    def is_parquet(self) -> bool:
        """Whether `start` and `stop` count row groups."""
        return self.path.suffix == ".parquet"

    @property
    def compression(self) -> str | None:
        """`.gz`, `.zst` or None."""
        return self.path.suffix if self.path.suffix in COMPRESSED_SUFFIXES else None

    @property
    def is_jsonl(self) -> bool:
        """Whether its lines, once decompressed, are JSON objects."""
        name = self.path.with_suffix("") if self.compression else self.path
        return name.suffix in JSONL_SUFFIXES

    def fingerprint(self, options: dict) -> str:
        """Changes with the file, with the cut, and with `options`: whatever else the tokens depend on."""
        content = {**self._asdict(), "path": str(self.path.resolve()), "options": options}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:32]

    def check_unchanged(self) -> None:
        """Raises DataError when the file is no longer the one that was cut into units."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path} changed while it was read. Start again when it is complete")


def cut_into_units(path: Path, text_field: str, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of one file, in order. Depends on the file and `unit_bytes` alone, not on who will encode them.

    Raises DataError when there is no such file, or it is parquet that cannot be read or has no text in `text_field`.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    status = path.stat()
    whole = Unit(path, status.st_size, status.st_mtime_ns, 0, status.st_size, status.st_size)
    if whole.is_parquet:
        groups = parquet.row_group_bytes(path, text_field)
        return [whole._replace(start=a, stop=b, file_bytes=sum(groups[a:b])) for a, b in _runs(groups, unit_bytes)]
    if whole.is_jsonl and not whole.compression:
        starts = range(0, whole.size, unit_bytes)
        stops = [min(start + unit_bytes, whole.size) for start in starts]
        return [whole._replace(start=a, stop=b, file_bytes=b - a) for a, b in zip(starts, stops, strict=True)]
    return [whole]


def place_in_file(unit: Unit, place: int) -> str:
    """File and line, or row, of what `read_unit` found at `place`. Reads the file up to a unit that is a piece of it."""
    if unit.is_parquet:
        return f"{unit.path}, row {place}"
    lines_before = 1 + _newlines(unit.path, unit.start - 1) if unit.start else 0
    return f"{unit.path}, line {lines_before + place}"


def _newlines(path: Path, stop: int) -> int:
    """Newlines among the first `stop` bytes."""
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, COUNT_BYTES))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _runs(sizes: list[int], wanted: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of runs of neighbours that are `wanted` together, or just above."""
    start = total = 0
    for index, size in enumerate(sizes):
        total += size
        if total >= wanted or index == len(sizes) - 1:
            yield start, index + 1
            start, total = index + 1, 0
