"""Who this process is in the world of ranks. A world of one is the same code with groups of size one."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemohybrid.errors import ConfigError

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
class ParallelContext:
    """The groups a rank belongs to, and the device it computes on. Handed to whoever communicates; there is no global one.

    data: ranks that share the batch; tensor: ranks that share every matrix; shard: the data ranks over which weights,
    gradients and optimizer state are cut, and `mesh` the same as FSDP wants it (with the copies of HSDP as first
    dimension); sequence: the tensor ranks also share the tokens of the residual stream.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    data: Group = Group()
    tensor: Group = Group()
    shard: Group = Group()
    mesh: DeviceMesh | None = None
    sequence: bool = False

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
        """The ranks over which the tokens of a global batch lie, each on one of them."""
        return self.world if self.sequence and self.tensor.size > 1 else self.data

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelContext:
        """Itself, as its groups are."""
        return self

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """A world of one."""
        return cls(torch.device(device))

    @classmethod
    def imaginary(cls, tensor: int, sequence: bool = True) -> ParallelContext:
        """The first of `tensor` ranks that are not there: for counting what one would hold, on the meta device."""
        return cls(torch.device("meta"), tensor=Group(tensor), sequence=sequence)


def world_from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) without it."""
    return tuple(
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )  # pyright: ignore[reportReturnType]


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` takes this rank's GPU where there is one. Raises ConfigError for `cuda` where this rank has none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        legal = "cpu, or no more ranks on this machine than it has GPUs" if seen else "cpu, auto"
        raise ConfigError(f"no GPU {local_rank} here ({seen} seen by torch). Legal: {legal}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start(
    device: str = "auto",
    backend: str = "auto",
    timeout_minutes: float = 10.0,
    tensor: int = 1,
    shard: int = 1,
    sequence: bool = True,
) -> ParallelContext:
    """Join the job torchrun started, or stay alone. Call once per process; `stop` undoes it. Sizes as in `divide`."""
    _, local_rank, world_size = world_from_environment()
    chosen = choose_device(device, local_rank)
    if world_size == 1:
        return ParallelContext(chosen)
    backend = ("nccl" if chosen.type == "cuda" else "gloo") if backend == "auto" else backend
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, device_id=chosen if chosen.type == "cuda" else None)
    return divide(chosen, tensor, shard, sequence, timeout)


def divide(
    device: torch.device,
    tensor: int = 1,
    shard: int = 1,
    sequence: bool = True,
    timeout: datetime.timedelta | None = None,
) -> ParallelContext:
    """The groups of this rank in a world that has met: `tensor` ranks to a matrix, weights cut over `shard` data ranks.

    Tensor ranks are neighbours, since they talk most: rank = (copy * shard + part) * tensor + tensor rank. `timeout` of a
    collective; None: torch's. Collective.
    """
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % (tensor * shard) == 0, f"{world} ranks are not made of {tensor} x {shard}"
    copies = world // (tensor * shard)
    mesh = init_device_mesh(device.type, (copies, shard, tensor), mesh_dim_names=("copy", "shard", "tensor"))
    both, meshes = mesh["copy", "shard"], {name: mesh[name] for name in ("copy", "shard", "tensor")}
    meshes["data"] = both._flatten("data") if min(copies, shard) > 1 else meshes["copy" if copies > 1 else "shard"]
    groups = {name: _group(part, timeout) for name, part in meshes.items()}
    return ParallelContext(
        device,
        rank,
        world,
        data=groups["data"],
        tensor=groups["tensor"],
        shard=groups["shard"],
        mesh=(both if copies > 1 else meshes["shard"]) if shard > 1 else None,
        sequence=sequence and tensor > 1,
    )


def _group(mesh: DeviceMesh, timeout: datetime.timedelta | None) -> Group:
    if mesh.size() == 1:
        return Group()
    if timeout is not None:  # a mesh makes its groups with torch's own
        dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group())
    return Group(mesh.size(), mesh.get_local_rank(), mesh.get_group())


def stop() -> None:
    """Leave the job, after everyone is done: a rank that leaves early makes its peers fail.

    Not for a rank that fails: its barrier would meet another collective of its peers. It just exits, and they notice.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
