"""Which row of the sorted experts' input belongs to which token: the permutation that both implementations share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.lazy import lazy

# T tokens, K experts of a token, E experts, n = T*K visits; visit t*K + k is that of token t to its k-th expert


@dataclass(frozen=True)
class Visits:
    """The visits of tokens to experts, sorted by expert, those of one expert in order of token. Nothing is dropped.

    With `absent` there may be visits to nobody, whose id is E. They come last, and what stands at their places is
    nothing to rely on.
    """

    order: Tensor  # [n] int64: the visit that stands at each place
    place: Tensor  # [n] int64: where each visit stands, the inverse of `order`
    ends: Tensor  # [E] int32: one past the place of each expert's last visit
    per_token: int  # K
    absent: bool = False

    @property
    def tokens(self) -> Tensor:
        """[n] int64: the token that stands at each place."""
        return self.order // self.per_token

    @property
    def end(self) -> Tensor | None:
        """[1] int32: the place where the visits to nobody begin; None where there can be none."""
        return self.ends[-1:] if self.absent else None

    @lazy
    def counts(self) -> list[int]:
        """Visits of each expert, on the host: on a GPU this waits for everything before it."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

    def by_place(self, per_visit: Tensor) -> Tensor:
        """[T, K] -> [n, 1]."""
        return per_visit.reshape(-1, 1).index_select(0, self.order)


def sort_by_expert(expert_ids: Tensor, experts: int, absent: bool = False) -> Visits:
    """expert_ids [T, K] -> their visits. The same on every run; on a GPU the host does not wait for it.

    Ends are looked up in the sorted ids: bincount would wait for the GPU, and count by atomics.
    """
    ids, order = expert_ids.flatten().sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return Visits(order, place, ends, expert_ids.shape[1], absent)


def sum_by_token(rows: Tensor, visits: Visits) -> Tensor:
    """rows [n, D] in order of expert -> [T, D]: every token gathers its K rows and adds them in order of k."""
    return by_visit(rows, visits).view(-1, visits.per_token, rows.shape[1]).sum(1)


def by_visit(rows: Tensor, visits: Visits) -> Tensor:
    """rows [n, D] in order of expert -> [n, D] in order of visit; those of nobody are zero, whatever stands there."""
    gathered = rows.index_select(0, visits.place)
    return gathered.masked_fill_((visits.place >= visits.ends[-1])[:, None], 0) if visits.absent else gathered


class _Spread(torch.autograd.Function):
    """`spread`, whose backward gathers too: that of index_select adds by atomics on GPUs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.copies = copies
        return rows.index_select(0, order // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gathered = grads[0].index_select(0, ctx.saved_tensors[1])
        return gathered.view(-1, ctx.copies, gathered.shape[1]).sum(1), None, None, None


def spread(rows: Tensor, visits: Visits) -> Tensor:
    """rows [T, D] -> [n, D]: each token's row to the places of its K visits. Differentiable."""
    return _Spread.apply(rows, visits.order, visits.place, visits.per_token)  # pyright: ignore[reportReturnType]


def arrange(rows: Tensor, visits: Visits) -> Tensor:
    """rows [n, D] in order of visit -> [n, D] in order of expert. Differentiable."""
    return _Spread.apply(rows, visits.order, visits.place, 1)  # pyright: ignore[reportReturnType]


def restore(rows: Tensor, visits: Visits) -> Tensor:
    """The inverse of `arrange`."""
    return _Spread.apply(rows, visits.place, visits.order, 1)  # pyright: ignore[reportReturnType]
