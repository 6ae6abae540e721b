"""`metadata.json`: every logical tensor of a checkpoint, its global shape, dtype, and where its chunks lie.

This is what DCP keeps in a pickle. Dtypes are spelt as in the safetensors format.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemohybrid.checkpoint.manifest import is_file_name, read_listed
from nemohybrid.errors import CheckpointError

METADATA = "metadata.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a logical tensor: where it begins, its shape, and the file and key that hold it."""

    offsets: Shape
    shape: Shape
    file: str
    key: str


@dataclass(frozen=True)
class TensorRecord:
    """A logical tensor of a checkpoint: global shape, dtype, and the chunks that tile it."""

    shape: Shape
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)


def encode(records: dict[str, TensorRecord]) -> dict[str, Any]:
    """The records as JSON values."""
    return {"tensors": {name: encode_record(record) for name, record in sorted(records.items())}}


def encode_record(record: TensorRecord) -> dict[str, Any]:
    """One record as JSON values; chunks in the order of their offsets."""
    chunks = sorted(record.chunks, key=lambda chunk: (chunk.offsets, chunk.key))
    return {"dtype": DTYPE_NAMES[record.dtype], "shape": record.shape, "chunks": [vars(chunk) for chunk in chunks]}


def read_metadata(folder: Path) -> dict[str, TensorRecord]:
    """Names, global shapes, dtypes and chunks of a checkpoint's tensors, without loading any.

    Raises CheckpointError when the file is missing, damaged or not consistent.
    """
    content = read_listed(folder, METADATA)
    try:
        records = {name: decode_record(record) for name, record in content["tensors"].items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / METADATA} is damaged: not the metadata of tensors ({error!r})") from error
    for name, record in records.items():
        if fault := fault_of(record):
            raise CheckpointError(f"{folder / METADATA} is damaged: {name}: {fault}")
    return records


def decode_record(record: dict[str, Any]) -> TensorRecord:
    """The inverse of `encode_record`; raises what a wrong JSON value happens to raise."""
    chunks = [
        Chunk(as_shape(chunk["offsets"]), as_shape(chunk["shape"]), str(chunk["file"]), str(chunk["key"]))
        for chunk in record["chunks"]
    ]
    return TensorRecord(as_shape(record["shape"]), DTYPES[record["dtype"]], chunks)


def as_shape(values: list[int]) -> Shape:
    """A list of sizes as a tuple; ValueError for anything that is no size."""
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values} is not a list of sizes")
    return tuple(values)


def fault_of(record: TensorRecord) -> str | None:
    """Why the chunks of `record` cannot be its tiles, or None. Overlaps were refused when it was saved."""
    for chunk in record.chunks:
        if not is_file_name(chunk.file):
            return f"{chunk.file!r} is not a plain file name inside the checkpoint"
        if not len(chunk.offsets) == len(chunk.shape) == len(record.shape):
            return f"chunk {chunk.key!r} has another number of dimensions"
        if any(begin + size > end for begin, size, end in zip(chunk.offsets, chunk.shape, record.shape, strict=True)):
            return f"chunk {chunk.key!r} reaches beyond the tensor"
    if sum(math.prod(chunk.shape) for chunk in record.chunks) != math.prod(record.shape):
        return "its chunks do not cover it"
    return None
