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
        scores = torch.bmm(rows, keys.mT)
        rest = None if q.dtype == torch.float32 else torch.baddbmm(scores, rows, keys.mT, beta=-1)
        ctx.settings = (starts, len(rows) * rows.shape[1], q.shape[2], q.shape[1] * q.shape[2], scale)
        call("softmax_forward", q, scores, rest, *ctx.settings, threads())
        ctx.save_for_backward(rows, keys, values, scores)
        ctx.shape = q.shape
        return torch.bmm(scores, values).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, keys, values, weights = ctx.saved_tensors
        dout = grads[0].reshape(rows.shape)
        dscores = torch.bmm(dout, values.mT)
        call("softmax_backward", rows, weights, dscores, *ctx.settings, threads())
        dq, dk, dv = torch.bmm(dscores, keys), torch.bmm(dscores.mT, rows), torch.bmm(weights.mT, dout)
        B, _, L, P = ctx.shape
        return dq.view(ctx.shape), dk.view(B, -1, L, P), dv.view(B, -1, L, P), None, None


def _matrices(t: Tensor, groups: int) -> Tensor:
    """[B, H, L, P] -> [B*K, H/K*L, P]"""
    return t.reshape(len(t) * groups, -1, t.shape[-1])
