"""Who this process is in the world of ranks. A world of one is the same code with groups of size one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemohybrid.parallel.context_parallel.ways import Ways

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. `handle` is None for a group of one, which never communicates.

    A larger group without a handle is imaginary: what is built for it has the right shapes, on the meta device.
    """

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Itself: a copied model talks to the same ranks."""
        return self


@dataclass(frozen=True)
class Axes:
    """Into how many ranks a world is divided along each axis; data ranks are what the others leave of it.

    context: ranks that share the tokens of a row, and `ways` in which layers that look across tokens do; for everything but
    the rows of a batch they are data ranks. shard: data ranks over which weights are cut; sequence: tensor ranks share the
    tokens of the residual stream. Experts have axes of their own over the ranks of a pipeline stage: expert x expert_tensor
    (None: as `tensor`) ranks hold them all, and a `dispatcher` with so much `room` takes tokens to them (`parallel.expert`).
    """

    tensor: int = 1
    shard: int = 1
    sequence: bool = True
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    dispatcher: str = "auto"
    room: float | None = None
    context: int = 1
    ways: Ways = Ways()

    @property
    def width(self) -> int:
        """Ranks that share the width of an expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def block(self) -> int:
        """Ranks that hold all experts together."""
        return self.expert * self.width

    @property
    def folds(self) -> bool:
        """Whether experts lie on the ranks in another way than everything else does."""
        return (self.expert, self.width) != (1, self.tensor)


@dataclass(frozen=True)
class ExpertRanks:
    """How the ranks of a pipeline stage hold the experts (parallel folding, arXiv 2504.14960).

    expert: ranks that have different experts; tensor: ranks that share the width of the same ones; block: both together,
    all experts in rank order expert * tensor ranks + tensor rank; data: ranks that hold the same part of the same experts,
    and see other tokens; shard: those of them over which that part is cut, and `mesh` as FSDP wants it.
    """

    expert: Group = Group()
    tensor: Group = Group()
    block: Group = Group()
    data: Group = Group()
    shard: Group = Group()
    mesh: DeviceMesh | None = None
    dispatcher: str = "auto"
    room: float = 0.0


@dataclass(frozen=True)
class ParallelContext:
    """The groups a rank belongs to, and the device it computes on. Handed to whoever communicates; there is no global one.

    data: ranks that share the tokens of the batch; context: those of them that share the tokens of the same rows; tensor:
    ranks that share every matrix; shard: the data ranks over which weights,
    gradients and optimizer state are cut, and `mesh` the same as FSDP wants it (with the copies of HSDP as first
    dimension); sequence: the tensor ranks also share the tokens of the residual stream.

    pipeline: ranks that share the layers; onward: the same in a group of its own, for what goes forward; stage: the ranks
    that hold the same layers as this one; ends: this rank's peer at
    the other end of the pipeline, where it is at an end. experts: None where they lie on the ranks as all else does.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    data: Group = Group()
    tensor: Group = Group()
    shard: Group = Group()
    mesh: DeviceMesh | None = None
    sequence: bool = False
    pipeline: Group = Group()
    onward: Group = Group()
    stage: Group = Group()
    ends: Group = Group()
    experts: ExpertRanks | None = None
    context: Group = Group()
    ways: Ways = Ways()

    @property
    def rows(self) -> Group:
        """The data ranks that have other rows of the batch, each of which may be several context ranks: size and number."""
        return Group(self.data.size // self.context.size, self.data.rank // self.context.size)

    @property
    def is_main(self) -> bool:
        """Rank 0, the only one that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def world(self) -> Group:
        """All ranks of the job."""
        return Group(self.world_size, self.rank, dist.group.WORLD) if self.world_size > 1 else Group()

    @property
    def tokens(self) -> Group:
        """The ranks over which the tokens of a global batch lie while they pass a layer, each on one of them."""
        return self.stage if self.sequence and self.tensor.size > 1 else self.data

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelContext:
        """Itself, as its groups are."""
        return self

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """A world of one."""
        return cls(torch.device(device))

    @classmethod
    def imaginary(cls, axes: Axes, stage: int = 0) -> ParallelContext:
        """A rank of a job that is not there, the first of pipeline rank `stage`: to count what it would hold, on meta."""
        block = Group(axes.block)
        experts = (
            ExpertRanks(Group(axes.expert), Group(axes.width), block, room=axes.room or 0.0) if axes.folds else None
        )
        return cls(
            torch.device("meta"),
            data=Group(axes.context),
            context=Group(axes.context),
            ways=axes.ways,
            tensor=Group(axes.tensor),
            sequence=axes.sequence and axes.tensor > 1,
            pipeline=Group(axes.pipeline, stage),
            ends=Group(2, min(stage, 1)) if axes.pipeline > 1 and stage in (0, axes.pipeline - 1) else Group(),
            experts=experts,
        )
