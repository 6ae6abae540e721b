"""Documents out of parquet, through pyarrow: an extra, imported when the first such file is met."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemohybrid.data.text import Damage, Document, NotUtf8, decode_utf8
from nemohybrid.errors import DataError, did_you_mean

BATCH_ROWS = 256
BUFFER_BYTES = 2**20  # read a column in pieces instead of a row group at once


def row_group_bytes(path: Path, text_field: str) -> list[int]:
    """Compressed bytes of the text column of each row group. Raises DataError when there is no such column of text."""
    with _opened(path) as file:
        column = _column_index(path, file, text_field)
        metadata = file.metadata
        return [metadata.row_group(i).column(column).total_compressed_size for i in range(metadata.num_row_groups)]


def parquet_documents(path: Path, start: int, stop: int, text_field: str) -> Iterator[Document | Damage]:
    """The documents of row groups [start, stop), in order. place: the row, counted from 1 through the whole file.

    Raises DataError with the row that was reached when the file is damaged.
    """
    with _opened(path) as file:
        column = _column_index(path, file, text_field)
        groups = [file.metadata.row_group(index) for index in range(stop)]
        row = sum(group.num_rows for group in groups[:start])
        for index in range(start, stop):
            share = groups[index].column(column).total_compressed_size // max(groups[index].num_rows, 1)
            for value in _values(path, file, index, row, text_field):
                row += 1
                yield _document(value, row, share, text_field)


def _values(path: Path, file, group: int, row: int, text_field: str) -> Iterator[bytes | None]:
    """The bytes of each text: pyarrow decodes a whole batch or none of it, so it is not asked to."""
    arrow = _pyarrow()
    batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_field], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
            values = [] if batch is None else batch.column(0).cast(arrow.large_binary()).to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged after row {row}: {error}. Fetch the file again") from None
        if batch is None:
            return
        row += len(values)
        yield from values


def _document(value: bytes | None, row: int, file_bytes: int, text_field: str) -> Document | Damage:
    if value is None:
        return Damage(f"column {text_field!r} is not text but null", row, file_bytes)
    try:
        return Document(decode_utf8(value), row, file_bytes)
    except NotUtf8 as error:
        return Damage(str(error), row, file_bytes)


def _column_index(path: Path, file, text_field: str) -> int:
    """Where the column stands among the leaves of the file. Raises DataError unless it is there and holds text."""
    schema = file.schema_arrow
    if text_field not in schema.names:
        found = ", ".join(map(repr, schema.names))
        raise DataError(f"{path}: no column {text_field!r}. Columns: {found}{did_you_mean(text_field, schema.names)}")
    kind = schema.field(text_field).type
    if _pyarrow().types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise DataError(f"{path}: column {text_field!r} is not text but {kind}")
    leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    return leaves.index(text_field)


@contextmanager
def _opened(path: Path) -> Iterator:
    """A ParquetFile. Raises DataError when it is not one, or pyarrow is absent."""
    arrow = _pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES)
    except arrow.ArrowException as error:
        raise DataError(f"{path} is damaged or not parquet: {error}. Fetch the file again") from None
    with file:
        yield file


def _pyarrow() -> types.ModuleType:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(
            "parquet is read with pyarrow, which is not installed: pip install 'nemohybrid[parquet]'"
        ) from None
    return pyarrow
