"""Rows that travel between context ranks: what goes forward one way comes back as gradients the other way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.parallel.collectives import gathered
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.expert.exchange import all_to_all


def moved(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """x [sum of sent, ...], `sent` rows of it to each rank -> [sum of received, ...]. Differentiable."""
    return _Moved.apply(x, tuple(sent), tuple(received), group)  # pyright: ignore[reportReturnType]


class _Moved(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: Group) -> Tensor:
        ctx.back = received, sent, group
        return all_to_all(x, sent, received, group)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sent, received, group = ctx.back
        return all_to_all(gradients[0], sent, received, group)(), None, None, None


def dealt(x: Tensor, group: Group) -> Tensor:
    """x [ranks, ...], a part for each rank -> what each rank had for this one, [ranks, ...]. Differentiable."""
    ones = [1] * group.size
    return moved(x, ones, ones, group)


def neighbours(group: Group, by: int) -> tuple[list[int], list[int]]:
    """One row to the rank `by` places to the right (left where negative), one from the other side; none at the ends."""
    ranks, rank = range(group.size), group.rank
    return [int(other == rank + by) for other in ranks], [int(other == rank - by) for other in ranks]


def from_left(x: Tensor, group: Group) -> Tensor:
    """x of the rank to the left; zeros on the first. Differentiable."""
    if group.size == 1:
        return torch.zeros_like(x)
    sent, received = neighbours(group, 1)
    came = moved(x[None][: sum(sent)], sent, received, group)
    return came[0] if group.rank else torch.zeros_like(x) + came.sum()  # of nothing: its way back must be taken too


def shifted(values: Tensor, by: int, group: Group) -> Tensor:
    """values [B, L] of this rank's tokens -> what stands `by` places further right in the row; zeros where it has ended.

    No gradients. Collective where ranks share a row.
    """
    following = torch.zeros_like(values[:, :by])
    if group.size > 1 and by:
        assert by <= values.shape[1], f"{by} places are more than the {values.shape[1]} tokens of a rank"
        heads = gathered(
            values[:, :by].detach()[None].to(torch.float32 if values.is_floating_point() else torch.int64), group
        )
        following = heads[group.rank + 1].to(values.dtype) if group.rank + 1 < group.size else following
    return torch.cat([values[:, by:], following], dim=1)
