"""The norms in C++: each pass reads its inputs once. Twins of `reference`; the gradient by hand, with its formula.

With g = x silu(z), n = g scale and w the weight, y = n w: dg = scale (dy w - n mean(n dy w)).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.cpp import call, rows, threads
from nemohybrid_kernels.opaque import opaque


def rms_norm_cpp(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `nemohybrid_kernels.norm.rms_norm`, for bf16 and fp32 on a CPU."""
    return _Norm.apply(x, None, weight, x.shape[-1], eps)  # pyright: ignore[reportReturnType]


def gated_rms_norm_cpp(x: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float) -> Tensor:
    """As `nemohybrid_kernels.norm.gated_rms_norm`, for bf16 and fp32 on a CPU."""
    return _Norm.apply(x, z.to(x.dtype), weight, group_size, eps)  # pyright: ignore[reportReturnType]


class _Norm(torch.autograd.Function):
    """Keeps its inputs and a scale for each group, and computes g and n again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, group: int, eps: float) -> Tensor:
        y, scale = forward(x, z, weight, group, eps)
        ctx.save_for_backward(x, z, weight, scale)
        ctx.group = group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        dx, dz, dw = _backward(grads[0], *saved, ctx.group)
        return dx, None if saved[1] is None else dz, dw, None, None


def like(x: Tensor, z: Tensor | None, weight: Tensor, group: int, eps: float) -> tuple[Tensor, Tensor]:
    """Tensors like those of `forward`."""
    D = x.shape[-1]
    return x.new_empty(x.shape), weight.new_empty(x.numel() // D, D // max(group, 1), dtype=torch.float32)


@opaque("cpp_norm", like=like)
def forward(x: Tensor, z: Tensor | None, weight: Tensor, group: int, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and the scale of each group."""
    x_rows, w = rows(x), weight.float().contiguous()
    n, D = x_rows.shape
    y, scale = x.new_empty(x.shape), w.new_empty(n, D // max(group, 1))
    call("norm_forward", x, *_strided(x_rows), *_strided(z), w, y, scale, n, D, group, eps, threads())
    return y, scale


def _like_gradients(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if z is None else z.new_empty(z.shape), torch.empty_like(weight)


@opaque("cpp_norm_backward", like=_like_gradients)
def _backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, scale: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz, which is empty without a z, and d of the weight."""
    dz = None if z is None else z.new_empty(z.shape)
    dx, dw = backward(dy, x, z, weight, scale, group, dz)
    return dx, x.new_empty(0) if dz is None else dz, dw


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, scale: Tensor, group: int, dz: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx and d of the weight. dz, which may be part of wider rows, is filled."""
    x_rows, w = rows(x), weight.float().contiguous()
    n, D = x_rows.shape
    dx, dw = x.new_empty(x.shape), torch.empty_like(w)
    inputs = (*_strided(x_rows), *_strided(z), w, scale, *_strided(dy))
    call("norm_backward", x, *inputs, dx, *_strided(dz), dw, n, D, group, threads())
    return dx, dw.to(weight.dtype)


def _strided(x: Tensor | None) -> tuple[Tensor | None, int]:
    """[..., D] as rows, and how far they are apart."""
    if x is None:
        return None, 0
    flat = rows(x)
    return flat, flat.stride(0)
