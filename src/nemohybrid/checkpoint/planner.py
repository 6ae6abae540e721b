"""DCP planners for tensors of which a rank holds several boxes, or none (`Parts`).

DCP knows whole tensors and DTensors, which are one box a rank. Tensor parallelism times FSDP is more than that: a rank
keeps two rows of the first half of a tensor and two of the second. Each box is planned by itself; a box that several
ranks hold is written by one of them, as DCP does it with replicas. Tensors and DTensors are left to DCP.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemohybrid.checkpoint.storage import described
from nemohybrid.checkpoint.tiling import Held
from nemohybrid.errors import CheckpointError
from nemohybrid.parallel.layout import Parts


class PartsSavePlanner(DefaultSavePlanner):
    """DCP's planner of a save, for `Parts` too. CheckpointError where the ranks' boxes do not make up a tensor."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the parts; DCP gets the rest."""
        self.parts, rest = split(state_dict)
        self.views = indexed(self.parts)
        super().set_up_planner(rest, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """DCP's plan and one item a box. The shapes go with it, since a rank without boxes has no items."""
        plan = super().create_local_plan()
        items = [write_item(index, view, self.parts[index.fqn].shape) for index, view in self.views.items()]
        shapes = {name: parts.shape for name, parts in self.parts.items()}
        return replace(plan, items=[*plan.items, *items], planner_data=shapes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On the coordinator: who writes what, if all of them together have everything."""
        check_whole(all_plans)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The box, or the tensor, that is to be written."""
        return self.views[index] if index in self.views else super().lookup_object(index)


class PartsLoadPlanner(DefaultLoadPlanner):
    """DCP's planner of a load, for `Parts` too: each box asks for its overlap with every saved chunk."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the parts; DCP gets the rest."""
        self.parts, rest = split(state_dict)
        self.views = indexed(self.parts)
        super().set_up_planner(rest, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """DCP's plan, and what the boxes ask for."""
        plan = super().create_local_plan()
        return replace(plan, items=[*plan.items, *self.read_items()])

    def read_items(self) -> Iterator[ReadItem]:
        """The overlaps of all boxes with what was saved."""
        assert self.metadata is not None, "set_up_planner is called with the metadata of the checkpoint"
        wanted: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        for index, view in self.views.items():
            wanted[index.fqn].append(chunk_of(index, view))
        for name, chunks in wanted.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata), "metadata.json knows no other kind"
            yield from create_read_items_for_chunk_list(name, saved, chunks)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box, or the tensor, that is to be filled."""
        return self.views[index] if index in self.views else super().lookup_tensor(index)


def split(state_dict: STATE_DICT_TYPE) -> tuple[dict[str, Parts], STATE_DICT_TYPE]:
    """The parts, and everything else."""
    parts = {name: value for name, value in state_dict.items() if isinstance(value, Parts)}
    return parts, {name: value for name, value in state_dict.items() if name not in parts}


def indexed(tensors: Mapping[str, Parts]) -> dict[MetadataIndex, Tensor]:
    """The view of each box by its name and offsets, which is what DCP knows it by.

    Empty boxes are left out, since one may begin where another box does; an empty tensor has no others.
    """
    return {
        MetadataIndex(name, offsets): view
        for name, parts in tensors.items()
        for offsets, view in parts.boxes
        if view.numel() or 0 in parts.shape
    }


def write_item(index: MetadataIndex, view: Tensor, shape: tuple[int, ...]) -> WriteItem:
    """DCP's word for: write this box of a tensor of that shape."""
    data = TensorWriteData(chunk_of(index, view), TensorProperties(dtype=view.dtype), torch.Size(shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def chunk_of(index: MetadataIndex, view: Tensor) -> ChunkStorageMetadata:
    """DCP's word for a box."""
    assert index.offset is not None, "a box has offsets"
    return ChunkStorageMetadata(index.offset, view.shape)


def check_whole(plans: list[SavePlan]) -> None:
    """CheckpointError that names the first tensor of which the plans of all ranks write too little or twice."""
    held: dict[str, Held] = defaultdict(Held)
    for rank, plan in enumerate(plans):
        for name, shape in plan.planner_data.items():
            held[name].shapes.setdefault(shape, rank)
        for item in plan.items:
            data, tensor = described(item), held[item.index.fqn]
            tensor.shapes.setdefault(tuple(data.size), rank)
            tensor.add(rank, data.properties.dtype, data.chunk.offsets, data.chunk.sizes)
    faults = [fault for name, tensor in held.items() if (fault := tensor.fault(name))]
    if faults:
        count = f" (the first of {len(faults)} tensors that are not whole)" if len(faults) > 1 else ""
        raise CheckpointError(faults[0] + count)


def views_of(name: str, tensor: Tensor | Parts) -> list[Tensor]:
    """What has memory here: the boxes, or the tensor itself. Boxes that cannot be of this tensor are our mistake."""
    if isinstance(tensor, Tensor):
        return [tensor]
    for offsets, view in tensor.boxes:
        assert len(offsets) == view.ndim == len(tensor.shape), f"{name}: a box has another number of dimensions"
        ends = tuple(map(sum, zip(offsets, view.shape, strict=True)))
        inside = all(begin >= 0 and end <= size for begin, end, size in zip(offsets, ends, tensor.shape, strict=True))
        assert inside, f"{name} {list(tensor.shape)}: a box from {list(offsets)} to {list(ends)} reaches beyond it"
    begins = [offsets for offsets, view in tensor.boxes if view.numel()]
    assert len(begins) == len(set(begins)), f"{name}: two boxes begin at the same place"
    return [view for _, view in tensor.boxes]
