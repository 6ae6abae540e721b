"""Cross entropy where each of several holders has some columns of the logits, and nobody has all.

Dimensions: T tokens, V columns of this holder, n tokens of a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.checks import check_shape, maths_dtype
from nemohybrid_kernels.cross_entropy.reference import blocks

Reduce = Callable[[Tensor], Tensor]
"""Replaces a tensor by what all holders' tensors give together, in place, the same for all."""


def cross_entropy_of_columns(logits: Tensor, labels: Tensor, first: int, largest: Reduce, total: Reduce) -> Tensor:
    """-log softmax(all holders' logits)[label] of every token.

    logits [T, V] of any float type, the columns `first` to first + V of all, V >= 0; labels [T] int64, the same for all
    holders, in the range of all columns. Two exchanges: `largest` of [T], `total` of [2, T] values. Returns [T] in fp32
    (float64 for float64 logits), and computes in it, maximum and sums included; the gradient has the logits' type and
    needs no exchange. Raises ShapeError. Twin: `reference.cross_entropy` of the columns put together.
    """
    check_shape("labels", labels, T=logits.shape[0])
    return _OfColumns.apply(logits, labels, first, largest, total)  # pyright: ignore[reportReturnType]


class _OfColumns(torch.autograd.Function):
    """Keeps the logits, and maximum and sum of each token: neither pass holds more than a block in fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, largest: Reduce, total: Reduce) -> Tensor:
        maths = maths_dtype(logits)
        column, here = _own_column(labels, first, logits.shape[1])
        top = largest(_largest(logits).to(maths))
        sums = total(_sums(logits, top, column, here))  # of exponentials, and of the label's logit
        ctx.save_for_backward(logits, column, here, top, sums[0])
        return sums[0].log() + top - sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dlogits = dloss * (softmax(logits) - onehot(label)), in the columns that are here."""
        logits, column, here, top, total = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        if not logits.shape[1]:
            return dlogits, None, None, None, None
        rows = (t[:, None] for t in (column, here, top, total, grads[0]))
        for out, some, label, own, most, denominator, grad in blocks(dlogits, logits, *rows):
            p = (some.to(grad.dtype) - most).exp_().mul_(grad / denominator)
            out.copy_(p.scatter_add_(1, label, -grad * own))
        return dlogits, None, None, None, None


def _own_column(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of each label the column here, 0 where it is another holder's, and whether it is here."""
    column = labels - first
    here = (column >= 0) & (column < columns)
    return column.masked_fill(~here, 0), here


def _largest(logits: Tensor) -> Tensor:
    """[T]; minus infinity where there are no columns."""
    return logits.amax(-1) if logits.shape[1] else logits.new_full(logits.shape[:1], -torch.inf)


def _sums(logits: Tensor, top: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """[2, T]: of exp(logit - top), and of the label's logit where it is here."""
    if not logits.shape[1]:
        return torch.zeros(2, *logits.shape[:1], dtype=top.dtype, device=top.device)
    parts = [
        torch.stack(
            [(some.to(most.dtype) - most).exp_().sum(-1), some.gather(1, label).squeeze(1).to(most.dtype) * own]
        )
        for some, most, label, own in blocks(logits, top[:, None], column[:, None], here)
    ]
    return torch.cat(parts, dim=1)
