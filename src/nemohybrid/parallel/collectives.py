"""The few collectives the framework uses, by the name of what they compute. On a group of one they do nothing."""

import torch
import torch.distributed as dist
from torch import Tensor

from nemohybrid.parallel.context import Group, ParallelContext


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the ranks of `group`, in place; returns the tensor. Not differentiable."""
    if group.handle is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group.handle)
    return tensor


def largest(value: int, context: ParallelContext) -> int:
    """The largest `value` of all ranks; on a world of one it does not touch the device."""
    if context.data.handle is None:
        return value
    tensor = torch.tensor(value, device=context.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=context.data.handle)
    return int(tensor.item())


def gather_bytes(payload: bytes, group: Group, device: torch.device) -> list[bytes]:
    """The equally long `payload` of every rank, in rank order."""
    if group.handle is None:
        return [payload]
    mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(everyone, mine, group=group.handle)
    return [bytes(t.cpu().numpy()) for t in everyone]


def wait_for_all(context: ParallelContext) -> None:
    """Every rank waits here until all have come."""
    if context.world_size > 1:
        dist.barrier()
