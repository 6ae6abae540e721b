"""The output projection and the loss in one, a chunk of tokens at a time: nobody ever holds the logits of all tokens.

The gradients are made in the backward pass, from logits that are multiplied once more. The forward pass could make them with
what it has at hand, one product of four less, but only for losses that all weigh the same: whatever weighs tokens later (a
mask, a mean over all ranks, the loss of an MTP depth) multiplies rows of the gradient of x, and cannot be taken into that of
the weight, which is a sum over tokens. Evaluation needs none at all.

Dimensions: T tokens, D channels, W rows of the weight, V of them columns of logits and the rest padding, n tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.checks import maths_dtype
from nemohybrid_kernels.cross_entropy.columns import Reduce
from nemohybrid_kernels.cross_entropy.reference import blocks

LOGIT_BYTES = 2**30
"""Of a chunk: 4096 tokens of 131,072 columns in bf16. Each chunk reads and writes the fp32 gradient of the weight once."""
MOST_TOKENS = 8192


class Rows(NamedTuple):
    """What is done with logits [n, W] that are at hand. `labels` [n] count this holder's columns, and may lie outside."""

    statistics: Callable[[Tensor, Tensor, int, Tensor], None]
    """logits, labels, V, out [3, n]: fills in the largest logit, the sum of exp(logit - largest), and the label's or 0."""
    gradient: Callable[[Tensor, Tensor, int, Tensor, Tensor], None]
    """logits, labels, V, [2, n] largest and sum of all holders, gradients of the losses [n]: logits become their gradient."""


class Passes(NamedTuple):
    """The functions below, for one kind of `Rows`."""

    statistics: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool, bool], tuple[Tensor, Tensor]]


class Holder(NamedTuple):
    """Which columns are here, and, where others have others, how to exchange: as `cross_entropy_of_columns` says."""

    columns: int
    first: int = 0
    largest: Reduce | None = None
    total: Reduce | None = None


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, holder: Holder, chunk_tokens: int | None, passes: Passes
) -> Tensor:
    """As `nemohybrid_kernels.cross_entropy.linear_cross_entropy`, by `passes`."""
    size = chunk_size(len(x), len(weight), x.element_size(), chunk_tokens)
    return _Chunked.apply(x, weight, labels - holder.first, holder, size, passes)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    """Keeps its arguments, and maximum and sum of each token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, holder: Holder, chunk: int, passes: Passes
    ) -> Tensor:
        top, sums, own = passes.statistics(x, weight, labels, holder.columns, chunk).unbind()
        if holder.largest is not None and holder.total is not None:
            most = holder.largest(top.clone())
            sums, own = holder.total(torch.stack([sums * (top - most).exp(), own])).unbind()
            top = most
        ctx.save_for_backward(x, weight, labels, torch.stack([top, sums]))
        ctx.columns, ctx.chunk, ctx.passes = holder.columns, chunk, passes
        return sums.log() + top - own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, labels, norm = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        how = ctx.columns, ctx.chunk, needs_x, needs_weight
        dx, dweight = ctx.passes.gradients(grads[0], x, weight, labels, norm, *how)
        return dx if needs_x else None, dweight if needs_weight else None, None, None, None, None


def chunk_size(tokens: int, width: int, itemsize: int, asked: int | None = None) -> int:
    """Tokens of a chunk: `asked`, or what LOGIT_BYTES hold; all chunks about equal, and a multiple of 128 where it can be.

    width: rows of the weight; itemsize: bytes of a logit.
    """
    fitting = LOGIT_BYTES // max(1, width * itemsize)
    most = asked or max(128, min(MOST_TOKENS, fitting) // 128 * 128)
    chunks = max(1, -(-tokens // most))
    equal = -(-tokens // chunks)
    return max(1, min(most, -(-equal // 128) * 128))


def statistics(x: Tensor, weight: Tensor, labels: Tensor, columns: int, chunk: int, rows: Rows) -> Tensor:
    """[3, T] in fp32, as `Rows.statistics` says."""
    out = x.new_zeros(3, x.shape[0], dtype=maths_dtype(x))
    if not columns:
        out[0] = -torch.inf
        return out
    matrix, room = weight.to(x.dtype), _room(x, weight, chunk)
    for at in _chunks(x.shape[0], chunk):
        logits = torch.mm(x[at], matrix.T, out=room[: len(labels[at])])
        rows.statistics(logits, labels[at], columns, out[:, at])
    return out


def gradients(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    norm: Tensor,
    columns: int,
    chunk: int,
    needs_x: bool,
    needs_weight: bool,
    rows: Rows,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, of this holder's part where there are several, and of the weight; empty if it is not needed.

    norm [2, T]: the largest logit and the sum of all holders. The gradient of the weight is added up in fp32.
    """
    dx = x.new_zeros(x.shape if needs_x else (0, x.shape[1]))
    total = weight.new_zeros(weight.shape if needs_weight else (0, x.shape[1]), dtype=maths_dtype(x))
    if not columns:
        return dx, total.to(weight.dtype)
    matrix, room = weight.to(x.dtype), _room(x, weight, chunk)
    for at in _chunks(x.shape[0], chunk):
        logits = torch.mm(x[at], matrix.T, out=room[: len(labels[at])])
        rows.gradient(logits, labels[at], columns, norm[:, at], dlosses[at])
        if needs_x:
            torch.mm(logits, matrix, out=dx[at])
        if needs_weight:
            _add_product(total, logits, x[at])
    return dx, total.to(weight.dtype)


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _room(x: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """For the logits of one chunk after another."""
    return x.new_empty(min(chunk, x.shape[0]), weight.shape[0])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right. On GPUs bf16 products are added in fp32, unrounded; elsewhere each is rounded first."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.device.type == "cuda":
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total += left.T @ right


def _statistics(logits: Tensor, labels: Tensor, columns: int, out: Tensor) -> None:
    for some, label, part in blocks(logits[:, :columns], labels[:, None], out.T):
        values, here = some.to(out.dtype), (label >= 0) & (label < columns)
        top = values.amax(1, keepdim=True)
        own = values.gather(1, label.where(here, 0)).where(here, 0)
        part.copy_(torch.cat([top, values.sub(top).exp_().sum(1, keepdim=True), own], 1))


def _gradient(logits: Tensor, labels: Tensor, columns: int, norm: Tensor, dlosses: Tensor) -> None:
    """logits = dloss * (softmax(logits) - onehot(label)); zero in padding."""
    of_rows = labels[:, None], norm.T, dlosses[:, None]
    for some, label, normed, dloss in blocks(logits[:, :columns], *of_rows):
        here, top, total = (label >= 0) & (label < columns), normed[:, :1], normed[:, 1:]
        p = some.to(norm.dtype).sub(top).exp_().mul_(dloss / total)
        some.copy_(p.scatter_add_(1, label.where(here, 0), -dloss * here))
    logits[:, columns:] = 0


def passes_of(rows: Rows) -> Passes:
    return Passes(partial(statistics, rows=rows), partial(gradients, rows=rows))


TORCH = passes_of(Rows(_statistics, _gradient))
"""In PyTorch: any type and device; the twin of the kernels."""
