"""A whole attention of two halves of the tokens, in one process: the smallest thing that is joined of parts, for comparisons."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.attention.parts import Keys, gradients_of_part, join, part_of_attention


def attention_in_halves(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None, softcap: float | None = None, backend: str = "auto"
) -> Tensor:
    """q [B, H, L, P], k and v [B, K, L, P] -> causal attention, like q. Differentiable.

    segments [B, L]: numbers of documents that are their own in a row; None: one a row. L is even.
    """
    return _Halves.apply(q, k, v, segments, softcap, backend)  # pyright: ignore[reportReturnType]


class _Halves(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, softcap: float | None, backend: str
    ) -> Tensor:
        ctx.softcap, ctx.backend = softcap, backend
        found = []
        for steps in _steps(k, v, segments, softcap):
            parts = [part_of_attention(q[:, :, at], keys, backend) for at, _, keys in steps]
            found.append(join(*parts[0], parts[1]) if len(parts) == 2 else parts[0])
        out, sums = (torch.cat(halves, 2) for halves in zip(*found, strict=True))
        ctx.save_for_backward(q, k, v, segments, out.to(q.dtype), sums)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, segments, out, sums = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=sums.dtype) for x in (q, k, v))
        for steps in _steps(k, v, segments, ctx.softcap):
            for at, there, keys in steps:
                mine, *whole = (x[:, :, at] for x in (q, out, sums, gradients[0]))
                found = gradients_of_part(mine, keys, *whole, backend=ctx.backend)
                dq[:, :, at] += found[0]
                dk[:, :, there] += found[1]
                dv[:, :, there] += found[2]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _steps(
    k: Tensor, v: Tensor, segments: Tensor | None, softcap: float | None
) -> Iterator[list[tuple[slice, slice, Keys]]]:
    """For each half of the queries: where they are, where the keys are, and these. A half begins with its own."""
    first, second = slice(0, k.shape[2] // 2), slice(k.shape[2] // 2, None)
    for at, others in ((first, [first]), (second, [second, first])):
        documents = [(None, None) if segments is None else (segments[:, at], segments[:, there]) for there in others]
        yield [
            (at, there, Keys(k[:, :, there], v[:, :, there], *of, at == there, k.shape[-1] ** -0.5, softcap))
            for there, of in zip(others, documents, strict=True)
        ]
