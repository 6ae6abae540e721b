"""Storage for torch.distributed.checkpoint (DCP) without pickle: safetensors shards and JSON.

DCP plans which rank writes which chunk of which logical tensor; its own storage keeps that plan in a pickled
`.metadata`, which executes code when it is loaded. Here chunks go to `rank00000-00000.safetensors` files
(format: https://huggingface.co/docs/safetensors) and the plan to `metadata.json`.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from nemohybrid.checkpoint.files import FileEntry, write_file
from nemohybrid.checkpoint.metadata import DTYPE_NAMES, METADATA, Chunk, TensorRecord, encode, read_metadata
from nemohybrid.errors import CheckpointError

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Stored:
    """What a rank tells the coordinator of a chunk it wrote."""

    chunk: Chunk
    file: FileEntry


class SafetensorsWriter(StorageWriter):
    """Writes a checkpoint's tensors into the existing, empty `folder`.

    A tensor that is not contiguous on the CPU is copied there one at a time, so that the host holds one chunk
    and never a file. Files hold at most `max_file_bytes`, or one chunk where that is larger.
    After `finish`, `files` lists on the coordinator every file that all ranks wrote.
    """

    def __init__(self, folder: str | PathLike[str], max_file_bytes: int = MAX_FILE_BYTES):
        self.folder = Path(folder)
        self.max_file_bytes = max_file_bytes
        self.files: dict[str, FileEntry] = {}

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Begin a new checkpoint, in the folder `checkpoint_id` where one is given."""
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)
        self.files = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the plan that comes back from the coordinator says which rank this is."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse objects that are no tensors: DCP would have to pickle them."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise CheckpointError(f"{item.index.fqn} is no tensor: put it into the JSON state instead")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank its number, which names its files."""
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks; the future is already complete."""
        results: list[WriteResult] = []
        for number, items in enumerate(split_by_bytes(plan.items, self.max_file_bytes)):
            name = f"rank{plan.storage_data:05d}-{number:05d}.safetensors"
            entry = write_file(self.folder / name, shard_pieces(items, planner))
            results += [write_result(item, name, entry) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after all ranks wrote: write `metadata.json` and collect the files' hashes."""
        records = {
            name: TensorRecord(tuple(tensor.size), tensor.properties.dtype)
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        for result in (result for rank_results in results for result in rank_results):
            records[result.index.fqn].chunks.append(result.storage_data.chunk)
            self.files[result.storage_data.chunk.file] = result.storage_data.file
        self.files[METADATA] = write_file(self.folder / METADATA, [json.dumps(encode(records)).encode()])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Only local or mounted folders, no URLs."""
        return "://" not in str(checkpoint_id)


class SafetensorsReader(StorageReader):
    """Reads tensors, or boxes of them, from a folder that `SafetensorsWriter` filled.

    The layout that loads need not be the one that saved: DCP asks for the overlap of each saved chunk with each
    wanted one, and only that is read.
    """

    def __init__(self, folder: str | PathLike[str]):
        self.reset(folder)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Forget what was read, and turn to the folder `checkpoint_id` where one is given."""
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)
        self.records: dict[str, TensorRecord] = {}
        self.chunks: dict[MetadataIndex, Chunk] = {}

    def read_metadata(self, *args: Any) -> Metadata:
        """The DCP metadata of the folder; CheckpointError where it is missing or damaged."""
        self.records = read_metadata(self.folder)
        tensors = {name: storage_metadata(record) for name, record in self.records.items()}
        return Metadata(state_dict_metadata=dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Index the chunks by the name and offsets by which DCP asks for them."""
        self.chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, record in self.records.items()
            for chunk in record.chunks
            if 0 not in chunk.shape  # an empty chunk may share its offsets with a full one, and is never read
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """DCP's plan as it is, in the order of the files so that each is opened once."""
        return replace(plan, items=sorted(plan.items, key=lambda item: self.chunks[item.storage_index].file))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Every rank reads for itself."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every planned box into the tensor it is for; the future is already complete."""
        for name, items in groupby(plan.items, key=lambda item: self.chunks[item.storage_index].file):
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as shard:
                    for item in items:
                        self.copy_box(shard, item, planner)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is damaged: not the safetensors file that was saved ({error})"
                ) from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def copy_box(self, shard: Any, item: ReadItem, planner: LoadPlanner) -> None:
        """Copy one box of a saved chunk into the place that the planner holds ready for it."""
        assert item.type == LoadItemType.TENSOR, "metadata.json knows no other kind"
        chunk, record = self.chunks[item.storage_index], self.records[item.storage_index.fqn]
        box = read_box(shard, chunk, item)
        if box.dtype != record.dtype or box.shape != item.lengths:
            found = f"{box.dtype} {list(box.shape)}"
            raise CheckpointError(f"{chunk.file}: {chunk.key} is {found}, which is not what {METADATA} says")
        target = planner.resolve_tensor(item).detach()
        target.copy_(box)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Only local or mounted folders, no URLs."""
        return "://" not in str(checkpoint_id)


def split_by_bytes(items: list[WriteItem], max_bytes: int) -> Iterator[list[WriteItem]]:
    """Cut `items` into runs of at most `max_bytes`, a larger item alone."""
    run: list[WriteItem] = []
    filled = 0
    for item in items:
        if run and filled + item_bytes(item) > max_bytes:
            yield aligned(run)
            run, filled = [], 0
        run.append(item)
        filled += item_bytes(item)
    if run:
        yield aligned(run)


def aligned(items: list[WriteItem]) -> list[WriteItem]:
    """Widest dtypes first, so that every tensor of a file begins at a multiple of its own width."""
    return sorted(items, key=lambda item: -described(item).properties.dtype.itemsize)


def described(item: WriteItem) -> TensorWriteData:
    """The tensor half of a write item."""
    assert item.tensor_data is not None, "prepare_local_plan lets only tensors through"
    return item.tensor_data


def item_bytes(item: WriteItem) -> int:
    """Bytes of the chunk that `item` writes."""
    return described(item).chunk.sizes.numel() * described(item).properties.dtype.itemsize


def chunk_key(item: WriteItem) -> str:
    """The key of a chunk in its file: the tensor's name, with the offsets where it is a part of it."""
    data = described(item)
    if data.chunk.sizes == data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"


def shard_pieces(items: list[WriteItem], planner: SavePlanner) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file that holds `items`: header, then one chunk after the other."""
    header, end = {}, 0
    for item in items:
        begin, end = end, end + item_bytes(item)
        dtype, shape = DTYPE_NAMES[described(item).properties.dtype], list(described(item).chunk.sizes)
        header[chunk_key(item)] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of the widest dtype
    yield struct.pack("<Q", len(text)) + text
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor), "prepare_local_plan lets only tensors through"
        yield tensor_bytes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor; a copy only where it is not contiguous on the CPU."""
    dense = tensor.detach().cpu().contiguous()
    row = dense.as_strided((dense.numel(),), (1,))  # flatten() leaves a lone value its stride, which view() refuses
    return row.view(torch.uint8).numpy().data


def write_result(item: WriteItem, file: str, entry: FileEntry) -> WriteResult:
    """What DCP gathers about one written chunk."""
    data = described(item)
    chunk = Chunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes), file, chunk_key(item))
    return WriteResult(index=item.index, size_in_bytes=item_bytes(item), storage_data=Stored(chunk, entry))


def storage_metadata(record: TensorRecord) -> TensorStorageMetadata:
    """A record in DCP's own terms."""
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in record.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=record.dtype), torch.Size(record.shape), chunks)


def read_box(shard: Any, chunk: Chunk, item: ReadItem) -> Tensor:
    """The box of a saved chunk that `item` asks for; SafetensorError where the file holds no such chunk."""
    if tuple(item.lengths) == chunk.shape:
        return shard.get_tensor(chunk.key)
    ends = (begin + length for begin, length in zip(item.storage_offsets, item.lengths, strict=True))
    return shard.get_slice(chunk.key)[tuple(map(slice, item.storage_offsets, ends))]
