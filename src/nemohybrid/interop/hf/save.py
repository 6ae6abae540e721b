"""Our models -> Hugging Face NemotronH folders, a tensor at a time; whole, or not there."""

import json
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemohybrid.checkpoint.files import explained, remove_tree, sync_folder, write_file
from nemohybrid.checkpoint.metadata import DTYPE_NAMES
from nemohybrid.checkpoint.storage import tensor_bytes
from nemohybrid.data.tokenizer_base import Tokenizer
from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf.config_out import DEFAULT_LENGTH, config_json
from nemohybrid.interop.hf.files import CONFIG, INDEX, WEIGHTS
from nemohybrid.interop.hf.names import DiskTensor, disk_tensors
from nemohybrid.interop.hf.special_ids import SpecialIds
from nemohybrid.interop.hf.tokenizer_files import write_tokenizer
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.parallel.layout import logical_parameters

SHARD_BYTES = 5 * 10**9
Values = Callable[[str], Tensor]
"""Logical name -> values."""


@dataclass(frozen=True)
class Format:
    """How a folder is written.

    dtype: of what need not stay fp32; length: of the sequences of the training; ids: of special tokens, where no tokenizer
    says what ends a document.
    """

    dtype: torch.dtype = torch.float32
    max_shard_bytes: int = SHARD_BYTES
    length: int = DEFAULT_LENGTH
    ids: SpecialIds = field(default_factory=dict)

    def dtype_of(self, tensor: DiskTensor) -> torch.dtype:
        """What a tensor is stored in."""
        return torch.float32 if tensor.stays_fp32 else self.dtype

    def bytes_of(self, tensor: DiskTensor) -> int:
        """What it takes in a file."""
        return torch.Size(tensor.shape).numel() * self.dtype_of(tensor).itemsize


def save_hf(
    model: HybridModel,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a NemotronH folder that transformers 5.23 and `load_hf` read. Returns the folder.

    Stored in `dtype`, but for A_log, D, dt_bias and routers, which stay fp32. With a tokenizer its files are written too.
    Beyond `max_shard_bytes` the weights are cut into several files with an index. The host holds one tensor besides the
    model. The folder appears by one rename when it is whole; it must be absent or empty.
    Raises CheckpointError for a model that has no equivalent there, and when the disk fails.
    """
    values = logical_parameters(model) | {name: buffer.detach() for name, buffer in model.named_buffers()}
    form = Format(dtype, max_shard_bytes)
    return write_folder(Path(folder), model, values.__getitem__, form, tokenizer)


def write_folder(folder: Path, model: HybridModel, values: Values, form: Format, tokenizer: Tokenizer | None) -> Path:
    """`save_hf` with values from elsewhere: the model says names and shapes only, and may be on the meta device."""
    if form.dtype not in DTYPES.values():
        raise CheckpointError(f"dtype={form.dtype} was asked for. Legal: {', '.join(map(str, DTYPES.values()))}")
    ids = form.ids if tokenizer is None else {**form.ids, "eos_token_id": tokenizer.eod}
    config = config_json(model.config, form.dtype, ids, form.length)
    with _appearing(folder) as temp:
        _write_weights(temp, list(disk_tensors(model).values()), values, form)
        if tokenizer is not None:
            write_tokenizer(tokenizer, temp)
        _write_json(temp / CONFIG, config)
    return folder


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block has ended well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder; nothing in it is overwritten")
    temp = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    with explained(f"writing {folder}"):
        temp.mkdir(parents=True)
        try:
            yield temp
            sync_folder(temp)
            temp.replace(folder)
            sync_folder(folder.parent)
        except BaseException:
            remove_tree(temp)
            raise


def _write_weights(folder: Path, tensors: Sequence[DiskTensor], values: Values, form: Format) -> None:
    """`model.safetensors`, or shards and their index."""
    shards = _shards(tensors, form)
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, _file_pieces(shard, values, form))
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(map(form.bytes_of, tensors))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _shards(tensors: Sequence[DiskTensor], form: Format) -> list[list[DiskTensor]]:
    """Runs of at most `max_shard_bytes`, a larger tensor alone; widest dtypes first, so that each tensor is aligned."""
    shards: list[list[DiskTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + form.bytes_of(tensor) > form.max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += form.bytes_of(tensor)
    return [sorted(shard, key=lambda tensor: -form.dtype_of(tensor).itemsize) for shard in shards]


def _file_pieces(tensors: Sequence[DiskTensor], values: Values, form: Format) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file (https://huggingface.co/docs/safetensors), each tensor made when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + form.bytes_of(tensor)
        dtype = DTYPE_NAMES[form.dtype_of(tensor)]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of the widest dtype
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        yield tensor_bytes(tensor.gather(values).to(form.dtype_of(tensor)))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, [json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"])
