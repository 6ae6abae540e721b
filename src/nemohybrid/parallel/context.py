"""Who this process is in the world of ranks. A world of one is the same code with groups of size one."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemohybrid.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other. `handle` is None for a group of one, which never communicates."""

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class ParallelContext:
    """The groups a rank belongs to, and the device it computes on. Handed to whoever communicates; there is no global one."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    data: Group = Group()
    tensor: Group = Group()

    @property
    def is_main(self) -> bool:
        """Rank 0, the only one that writes files and speaks to the user."""
        return self.rank == 0

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "ParallelContext":
        """A world of one."""
        return cls(torch.device(device))


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
        raise ConfigError(f"no GPU {local_rank} here ({torch.cuda.device_count()} seen by torch). Legal: cpu, auto")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start(device: str = "auto", backend: str = "auto", timeout_minutes: float = 10.0) -> ParallelContext:
    """Join the job torchrun started, or stay alone. Call once per process; `stop` undoes it."""
    rank, local_rank, world_size = world_from_environment()
    chosen = choose_device(device, local_rank)
    if world_size == 1:
        return ParallelContext(chosen)
    backend = ("nccl" if chosen.type == "cuda" else "gloo") if backend == "auto" else backend
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, device_id=chosen if chosen.type == "cuda" else None)
    everyone = Group(world_size, rank, dist.group.WORLD)
    return ParallelContext(chosen, rank, world_size, data=everyone)


def stop() -> None:
    """Leave the job, after everyone is done: a rank that leaves early makes its peers fail.

    Not for a rank that fails: its barrier would meet another collective of its peers. It just exits, and they notice.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
