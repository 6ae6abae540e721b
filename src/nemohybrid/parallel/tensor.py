"""Where the residual stream meets matrices that tensor ranks share: what goes forward, and what comes back.

Outside of such a region all tensor ranks hold the whole stream, or with sequence parallelism each holds some of its tokens
(Korthikanti et al. 2022, arXiv 2205.05198, section 4.2). Inside, each computes with its heads or channels of all tokens, and
what it returns is a summand. Gradients of whole tensors are whole on every rank.

          forward          backward                       forward             backward
  enter   (nothing)        sum               with tokens  gather              sum, own part
  leave   sum              (nothing)           cut        sum, own part       gather
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.errors import DataError
from nemohybrid.parallel.collectives import gathered, own_part, summed, summed_part
from nemohybrid.parallel.context import Group

Exchange = Callable[[Tensor, Group], Tensor]


@dataclass(frozen=True)
class TensorRanks:
    """The tensor ranks of a microbatch; `cut`: each holds an equal run of its tokens on the residual stream."""

    group: Group = Group()
    cut: bool = False

    def check(self, tokens: int) -> None:
        """Raises DataError where the tokens do not divide: a collective over unequal parts aborts the process."""
        if self.cut and tokens % self.group.size:
            raise DataError(
                f"{tokens} tokens cannot be shared by {self.group.size} tensor ranks. "
                f"Legal: a multiple of {self.group.size}, or parallel.sequence=false"
            )

    def enter(self, x: Tensor) -> Tensor:
        """Own tokens [T or T/ranks, ...] of a stream -> all tokens [T, ...], at the entrance of a shared region."""
        if self.group.size == 1:
            return x
        return _exchange(x, self.group, *((gathered, summed_part) if self.cut else (_keep, summed)))

    def leave(self, x: Tensor) -> Tensor:
        """Summands [T, ...] of all tokens -> their sum, own tokens [T or T/ranks, ...], at the exit of a region."""
        if self.group.size == 1:
            return x
        return _exchange(x, self.group, *((summed_part, gathered) if self.cut else (summed, _keep)))

    def whole(self, x: Tensor) -> Tensor:
        """Own tokens -> all tokens, for what every rank then computes alike: its gradient is whole on each."""
        return _exchange(x, self.group, gathered, own_part) if self.cut else x

    def own(self, x: Tensor) -> Tensor:
        """The inverse of `whole`: all tokens, the same on every rank -> own tokens."""
        return _exchange(x, self.group, own_part, gathered) if self.cut else x


def gathered_columns(part: Tensor, sizes: Sequence[int], ranks: TensorRanks) -> Tensor:
    """part [T, n] of every rank, n as in `sizes` -> all columns [T, sum of sizes], with which ranks then compute alike."""
    group = ranks.group
    if group.size == 1:
        return part
    widest = F.pad(part, (0, max(sizes) - part.shape[1])).T
    rows = _exchange(widest, group, gathered, own_part)
    return torch.cat([r[:n] for r, n in zip(rows.split(max(sizes)), sizes, strict=True)]).T


def best_column(part: Tensor, first: int, group: Group) -> Tensor:
    """part [T, n], columns `first` to first + n of all ranks' -> the number of the largest in each row, [T] int64."""
    if group.size == 1:
        return part.argmax(-1)
    value, index = F.pad(part.detach(), (0, 1), value=-torch.inf).float().max(-1)  # a rank may hold nothing but padding
    values, indices = gathered(value[None], group), gathered(index[None] + first, group)
    return indices.gather(0, values.argmax(0, keepdim=True))[0]


def _keep(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _exchange(x: Tensor, group: Group, forward: Exchange, backward: Exchange) -> Tensor:
    return _Exchange.apply(x, group, forward, backward)  # pyright: ignore[reportReturnType]


class _Exchange(Function):
    """forward(x) one way, backward(gradient) the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forward: Exchange, backward: Exchange) -> Tensor:
        ctx.group, ctx.back = group, backward
        return forward(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.back(gradients[0], ctx.group), None, None, None
