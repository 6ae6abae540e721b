"""Sending in two halves, with something else between them: forward, and backward too.

Autograd runs nodes in the reverse order of their creation. So what is created between `launch` and `arrive` computes
its gradients between the two halves of the way back: that of `arrive` sends, that of `launch` waits. What a checkpoint
computes again ends with the last tensor that was saved: what goes home after that is not sent a second time.

          forward                                        backward
  launch  sends                                          waits
  ...     runs while it travels                          runs while it travels
  arrive  waits                                          sends
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.parallel.collectives import functional
from nemohybrid.parallel.context import Group

Pending = Callable[[], tuple[Tensor, ...]]
"""Tensors on their way; a call waits for them. To be called once."""
Sender = Callable[..., Pending]


class Trip:
    """One way, `there`, and for gradients `back`; and what is under way at the moment."""

    def __init__(self, there: Sender, back: Sender) -> None:
        self.there, self.back = there, back
        self.pending: Pending | None = None

    def arrived(self) -> tuple[Tensor, ...]:
        """Wait for what is under way."""
        assert self.pending is not None, "nothing was sent"
        pending, self.pending = self.pending, None
        return pending()


def launch(trip: Trip, *tensors: Tensor) -> Tensor:
    """Send `tensors` -> a ticket for `arrive`."""
    return _Launch.apply(trip, *tensors)  # pyright: ignore[reportReturnType]


def arrive(trip: Trip, ticket: Tensor) -> tuple[Tensor, ...]:
    """What the trip brought."""
    return _Arrive.apply(trip, ticket)  # pyright: ignore[reportReturnType]


def all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Callable[[], Tensor]:
    """rows [sum of sent, ...], `sent` of them to each rank -> what waits for [sum of received, ...], so many from each.

    On the meta device nothing is sent.
    """
    if rows.is_meta:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        return lambda: arrived
    assert group.handle is not None, "an imaginary group has nobody to talk to"
    coming = functional.all_to_all_single(rows.contiguous(), list(received), list(sent), group.handle.group_name)
    return lambda: functional.wait_tensor(coming)


class _Launch(Function):
    """The ticket is no data: what travels has other shapes one way than the other, which autograd would refuse."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, *tensors: Tensor) -> Tensor:
        ctx.trip = trip
        trip.pending = trip.there(*tensors)
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.trip.arrived()


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, trip: Trip, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return trip.arrived()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.trip.pending = ctx.trip.back(*gradients)
        return None, torch.zeros((), device=gradients[0].device)
