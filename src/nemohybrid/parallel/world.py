"""Meeting the other ranks of a job, and dividing them: along the axes of the model, and along those of its experts."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemohybrid.errors import ConfigError
from nemohybrid.parallel.context import Axes, ExpertRanks, Group, ParallelContext

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ROOM_ON_GPUS = 2.0
"""Rows an exchange between experts may take there, as a multiple of the mean, where nothing else is said."""


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
    axes: Axes | None = None,
    met: Callable[[ParallelContext], object] | None = None,
) -> ParallelContext:
    """Join the job torchrun started, or stay alone. Call once per process; `stop` undoes it. `axes` as in `divide`.

    met: called once all ranks have met and are not divided yet, for what must be known before: ranks that divide
    themselves differently wait for each other.
    """
    _, local_rank, world_size = world_from_environment()
    chosen = choose_device(device, local_rank)
    if world_size == 1:
        return ParallelContext(chosen)
    backend = ("nccl" if chosen.type == "cuda" else "gloo") if backend == "auto" else backend
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, device_id=chosen if chosen.type == "cuda" else None)
    if met is not None:
        met(ParallelContext(chosen, dist.get_rank(), world_size))
    return divide(chosen, axes, timeout)


def divide(
    device: torch.device, axes: Axes | None = None, timeout: datetime.timedelta | None = None
) -> ParallelContext:
    """The groups of this rank in a world that has met. Collective.

    Tensor ranks are neighbours, since they talk most, and pipeline ranks are far apart:
    rank = ((stage * copies + copy) * shard + part) * tensor + tensor rank. Data ranks, which number copy * shard + part has,
    are row * context + context rank. The ranks of a stage hold the experts as
    (copy, part, expert, width), the last being neighbours. `timeout` of a collective; None: torch's.
    """
    from torch.distributed.device_mesh import init_device_mesh

    axes, world = axes or Axes(), dist.get_world_size()
    own = axes.tensor * axes.shard * axes.pipeline
    assert world % own == 0, f"{world} ranks are not made of {axes}"
    sizes = {"stage": axes.pipeline, "copy": world // own, "shard": axes.shard, "tensor": axes.tensor}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    dense = _Meshes(mesh, timeout)
    assert axes.context == 1 or sizes["copy"] * axes.shard % axes.context == 0, f"{axes} does not make {world} ranks"
    pipeline = dense.group("stage")
    onward, stage = _line(device, pipeline, dense, timeout)
    return ParallelContext(
        device,
        dist.get_rank(),
        world,
        data=dense.group("copy", "shard"),
        tensor=dense.group("tensor"),
        shard=dense.group("shard"),
        mesh=dense.cut("copy", "shard"),
        sequence=axes.sequence and axes.tensor > 1,
        pipeline=pipeline,
        onward=onward,
        stage=stage,
        ends=_ends(mesh, pipeline, timeout),
        experts=_fold(device, axes, world // axes.pipeline, timeout) if axes.folds else None,
        context=_context(device, axes, world, timeout),
        ways=axes.ways,
    )


def _context(device: torch.device, axes: Axes, world: int, timeout: datetime.timedelta | None) -> Group:
    """The ranks that share the rows of this one. Collective."""
    from torch.distributed.device_mesh import init_device_mesh

    if axes.context == 1:
        return Group()
    if axes.context == world:  # where a mesh would take the group of the world a second time
        return Group(world, dist.get_rank(), dist.group.WORLD)
    rows = world // (axes.context * axes.tensor)
    sizes = {"row": rows, "context": axes.context, "width": axes.tensor}
    return _Meshes(init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)), timeout).group(
        "context"
    )


def _line(
    device: torch.device, pipeline: Group, dense: _Meshes, timeout: datetime.timedelta | None
) -> tuple[Group, Group]:
    """A second group of the ranks of a pipeline, and the group of the ranks of a stage. Collective."""
    from torch.distributed.device_mesh import init_device_mesh

    if pipeline.size == 1:
        return pipeline, dense.group("copy", "shard", "tensor")
    if pipeline.size == dist.get_world_size():  # where a mesh would take the group of the world a second time
        handle = dist.new_group(timeout=timeout)
        assert isinstance(handle, dist.ProcessGroup), "every rank is in it"
        return replace(pipeline, handle=handle), Group()
    sizes = {"onward": pipeline.size, "ranks": dist.get_world_size() // pipeline.size}
    line = _Meshes(init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)), timeout)
    return line.group("onward"), line.group("ranks")


def room_on(device: torch.device, axes: Axes) -> float:
    """The room of exchanges between experts, with what is said where nothing is. DeepEP has none."""
    if axes.room is None and device.type == "cuda" and axes.dispatcher != "deepep":
        return ROOM_ON_GPUS
    return axes.room or 0.0


def _fold(device: torch.device, axes: Axes, ranks: int, timeout: datetime.timedelta | None) -> ExpertRanks:
    """The second grid over the `ranks` ranks of each stage. Collective."""
    from torch.distributed.device_mesh import init_device_mesh

    cut = axes.shard * axes.tensor // axes.block if axes.shard > 1 else 1
    assert cut, f"{axes.shard * axes.tensor} ranks that cut weights do not hold all experts: {axes}"
    assert ranks % (cut * axes.block) == 0, f"{ranks} ranks of a stage do not hold experts as {axes}"
    copies = ranks // (cut * axes.block)
    sizes = {"stage": axes.pipeline, "copy": copies, "shard": cut, "expert": axes.expert, "width": axes.width}
    grid = _Meshes(init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)), timeout)
    return ExpertRanks(
        grid.group("expert"),
        grid.group("width"),
        grid.group("expert", "width"),
        grid.group("copy", "shard"),
        grid.group("shard"),
        grid.cut("copy", "shard", always=axes.shard > 1),
        axes.dispatcher,
        room_on(device, axes),
    )


def stop() -> None:
    """Leave the job, after everyone is done: a rank that leaves early makes its peers fail.

    Not for a rank that fails: its barrier would meet another collective of its peers. It just exits, and they notice.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class _Meshes:
    """Groups of a mesh of all ranks, each made once."""

    def __init__(self, mesh: DeviceMesh, timeout: datetime.timedelta | None) -> None:
        self.mesh, self.timeout = mesh, timeout

    def group(self, *dims: str) -> Group:
        """This rank's peers along these dimensions of the mesh."""
        wide = [dim for dim in dims if self.mesh[dim].size() > 1] or list(dims[:1])
        part = self.mesh[wide[0]] if len(wide) == 1 else self.mesh[tuple(wide)]._flatten("-".join(wide))
        if part.size() == 1:
            return Group()
        return Group(part.size(), part.get_local_rank(), _patient(part.get_group(), self.timeout))

    def cut(self, copies: str, parts: str, always: bool = False) -> DeviceMesh | None:
        """The mesh over which FSDP cuts parameters, with its copies as first dimension where there are several.

        None where there is nothing to cut, but for `always`.
        """
        if self.mesh[parts].size() == 1 and not always:
            return None
        return self.mesh[copies, parts] if self.mesh[copies].size() > 1 else self.mesh[parts]


def _ends(mesh: DeviceMesh, pipeline: Group, timeout: datetime.timedelta | None) -> Group:
    """This rank and its peer on the first or last stage; alone on a stage in between. Collective."""
    if pipeline.size <= 2:
        return pipeline
    pairs = mesh.mesh.flatten(1)[[0, -1]].T.tolist()
    groups = [dist.new_group(pair, timeout=timeout) for pair in pairs]
    own = next((group for group in groups if isinstance(group, dist.ProcessGroup)), None)  # that of others is a number
    return Group() if own is None else Group(2, min(pipeline.rank, 1), own)


def _patient(handle: dist.ProcessGroup, timeout: datetime.timedelta | None) -> dist.ProcessGroup:
    if timeout is not None:  # a mesh makes its groups with torch's own
        dist.distributed_c10d._set_pg_timeout(timeout, handle)
    return handle
