"""Attention over short rows on a CPU: batched products, and the softmax between them in C++.

PyTorch's fused kernel for CPUs is slower than this while all scores of a layer fit the cache, and needs less memory from there
on. So do not its scores differ: a product of bf16 matrices is rounded to bf16, so a second one makes what was rounded away.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels import cpp
from nemohybrid_kernels.attention import sdpa
from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.packing import Documents
from nemohybrid_kernels.cpp import call, threads
from nemohybrid_kernels.opaque import opaque

LONGEST = 512
"""Tokens of a row from which on PyTorch's kernel is taken: scores are L x L."""


def obstacle(case: Case, device: torch.device) -> str | None:
    """Why it cannot do `case` on `device`, or None."""
    if case.capped or case.masked:
        return "it knows neither a softcap nor masks other than of documents"
    return cpp.obstacle(device, case.dtype)


def reluctance(case: Case, device: torch.device) -> str | None:
    """Why "auto" rather takes PyTorch's kernel, or None."""
    return "PyTorch's kernel is as fast in fp32" if case.dtype == torch.float32 else cpp.reluctance(device)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Arguments and result as of `nemohybrid_kernels.attention.attention`, mask and softcap None.

    Rows of more than LONGEST tokens go to PyTorch's kernel.
    """
    if q.shape[2] > LONGEST:
        return sdpa.run(q, k, v, documents=documents, scale=scale)
    starts = None if documents is None else documents.starts
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, starts, scale)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    """Keeps the weights. n = B*K matrices, in which the R query heads of a key head stand one below the other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float) -> Tensor:
        rows, keys, values = (_matrices(t, k.shape[1]) for t in (q, k, v))
        out, weights = _forward(rows, keys, values, starts, q.shape[1], q.shape[2], scale)
        ctx.save_for_backward(rows, keys, values, weights, starts)
        ctx.shape, ctx.scale = q.shape, scale
        return out.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (B, H, L, P), saved = ctx.shape, ctx.saved_tensors
        dq, dk, dv = _backward(grads[0].reshape(saved[0].shape), *saved, H, L, ctx.scale)
        return dq.view(ctx.shape), dk.view(B, -1, L, P), dv.view(B, -1, L, P), None, None


def _like(
    rows: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, H: int, L: int, scale: float
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(*rows.shape[:2], L)


@opaque("cpp_attention", like=_like)
def _forward(
    rows: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, H: int, L: int, scale: float
) -> tuple[Tensor, Tensor]:
    """rows [n, R*L, P], keys and values [n, L, P] -> their product [n, R*L, P], and the weights [n, R*L, L]."""
    scores = torch.bmm(rows, keys.mT)
    rest = None if rows.dtype == torch.float32 else torch.baddbmm(scores, rows, keys.mT, beta=-1)
    call("softmax_forward", rows, scores, rest, *_settings(rows, starts, H, L, scale), threads())
    return torch.bmm(scores, values), scores


def _like_gradients(dout: Tensor, rows: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (rows, keys, values))


@opaque("cpp_attention_backward", like=_like_gradients)
def _backward(
    dout: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    starts: Tensor | None,
    H: int,
    L: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d of rows, keys and values."""
    dscores = torch.bmm(dout, values.mT)
    call("softmax_backward", rows, weights, dscores, *_settings(rows, starts, H, L, scale), threads())
    return torch.bmm(dscores, keys), torch.bmm(dscores.mT, rows), torch.bmm(weights.mT, dout)


def _settings(rows: Tensor, starts: Tensor | None, H: int, L: int, scale: float) -> tuple[Any, ...]:
    return starts, len(rows) * rows.shape[1], L, H * L, scale


def _matrices(t: Tensor, groups: int) -> Tensor:
    """[B, H, L, P] -> [B*K, H/K*L, P]"""
    return t.reshape(len(t) * groups, -1, t.shape[-1])
