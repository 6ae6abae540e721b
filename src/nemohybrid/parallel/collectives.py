"""The few collectives the framework uses, by the name of what they compute. On a group of one they do nothing.

None is differentiable by itself: `parallel.tensor` says what goes forward and what comes back. On the meta device nothing
is sent, and the result has the right shape.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from torch import Tensor

from nemohybrid.parallel.context import Group, ParallelContext

functional = torch.ops._c10d_functional
"""The operators themselves: their Python wrappers change names between versions of torch, and cost more."""


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the ranks of `group`, in place; returns the tensor."""
    if group.handle is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group.handle)
    return tensor


def largest_over(tensor: Tensor, group: Group) -> Tensor:
    """The largest of each element over the ranks of `group`, in place; returns the tensor."""
    if group.handle is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.handle)
    return tensor


def summed(x: Tensor, group: Group) -> Tensor:
    """A new tensor, the sum of all ranks' `x`."""
    if group.size == 1 or x.is_meta:
        return x
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", _name(group)))


def gathered(x: Tensor, group: Group) -> Tensor:
    """x [n, ...] of every rank, in rank order -> [size * n, ...]."""
    if group.size == 1 or x.is_meta:
        return x if group.size == 1 else x.new_empty(group.size * x.shape[0], *x.shape[1:])
    return functional.wait_tensor(functional.all_gather_into_tensor(x.contiguous(), group.size, _name(group)))


def summed_part(x: Tensor, group: Group) -> Tensor:
    """x [size * n, ...] -> this rank's n rows of the sum of all ranks' `x`."""
    if group.size == 1 or x.is_meta:
        return own_part(x, group)
    part = functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size, _name(group))
    return functional.wait_tensor(part)


def own_part(x: Tensor, group: Group) -> Tensor:
    """x [size * n, ...] -> this rank's n rows. Nothing is sent."""
    rows = x.shape[0] // group.size
    return x.narrow(0, group.rank * rows, rows)


def _name(group: Group) -> str:
    assert group.handle is not None, "an imaginary group has nobody to talk to"
    return group.handle.group_name


def from_first(tensor: Tensor, context: ParallelContext) -> Tensor:
    """Rank 0's `tensor` on every rank: what ranks could decide differently by the last bit, one decides."""
    if context.world_size == 1:
        return tensor
    agreed = tensor.to(context.device).contiguous()
    dist.broadcast(agreed, src=0)
    return agreed.to(tensor.device)


def largest(value: int, context: ParallelContext) -> int:
    """The largest `value` of all ranks; on a world of one it does not touch the device."""
    world = context.world
    return (
        value if world.handle is None else int(largest_over(torch.tensor(value, device=context.device), world).item())
    )


def gather_bytes(payload: bytes, group: Group, device: torch.device) -> list[bytes]:
    """The equally long `payload` of every rank, in rank order."""
    if group.handle is None:
        return [payload]
    mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(everyone, mine, group=group.handle)
    return [bytes(t.cpu().numpy()) for t in everyone]


def gather_json(item: Any, group: Group, device: torch.device) -> list[Any]:
    """What every rank passed, in rank order. Blanks at the end, which mean nothing in JSON, make all equally long."""
    if group.handle is None:
        return [item]
    text = json.dumps(item).encode()
    longest = int(largest_over(torch.tensor(len(text), device=device), group).item())
    return [json.loads(other) for other in gather_bytes(text.ljust(longest), group, device)]


def wait_for_all(context: ParallelContext) -> None:
    """Every rank waits here until all have come."""
    if context.world_size > 1:
        dist.barrier()
