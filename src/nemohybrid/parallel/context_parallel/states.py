"""What a recurrence leaves behind on a rank, passed on to the ranks to the right.

A rank makes of the state S that comes in D S + E, E being what it would leave of zeros. So rank r begins with

  S_r = D_{r-1} S_{r-1} + E_{r-1},   S_0 = 0,

which c ranks find in log2(c) + 1 exchanges of one state each (Hillis & Steele 1986), whatever their number. The gradients of
the E come by the same sum from the right.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.moves import neighbours
from nemohybrid.parallel.expert.exchange import all_to_all

# B rows, H heads, P head dim, N state


def carried(left: Tensor, decay: Tensor, group: Group) -> Tensor:
    """left [B, H, P, N] fp32, E above; decay [B, H] fp32, D above -> the state this rank begins with, [B, H, P, N].

    Differentiable in both. Collective.
    """
    return _Carried.apply(left, decay, group)  # pyright: ignore[reportReturnType]


class _Carried(Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, decay: Tensor, group: Group) -> Tensor:
        ctx.group = group
        state = _summed_up(left, decay, group, 1)
        ctx.save_for_backward(state, decay)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        state, decay = ctx.saved_tensors
        d_left = _summed_up(gradients[0], decay, ctx.group, -1)
        return d_left, (d_left * state).sum((2, 3)), None


def _summed_up(left: Tensor, decay: Tensor, group: Group, way: int) -> Tensor:
    """The state that comes to this rank from its left (way 1) or right (way -1)."""
    by, state, through = 1, left, decay[..., None, None]
    while by < group.size:
        before = _from(torch.cat([state.flatten(2), through[..., 0]], 2), group, by * way)
        came, their_decay = before[..., :-1].view_as(state), before[..., -1:, None]
        state, through, by = state + through * came, through * their_decay, 2 * by
    return _from(state, group, way)


def _from(x: Tensor, group: Group, by: int) -> Tensor:
    """x of the rank `by` places to the left; zeros where there is none."""
    sent, received = neighbours(group, by)
    came = all_to_all(x[None][: sum(sent)], sent, received, group)()
    return came[0] if len(came) else torch.zeros_like(x)
