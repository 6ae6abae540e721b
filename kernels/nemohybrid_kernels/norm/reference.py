"""Root-mean-square norms in plain PyTorch, computed in fp32 (float64 for float64 input)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.checks import check_divides, check_shape, maths_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    x [..., D], weight [D]. Returns x's shape and type; all between is fp32. Raises ShapeError.
    """
    check_shape("weight", weight, D=x.shape[-1])
    maths = maths_dtype(x)
    return (_unit_rms(x.to(maths), eps) * weight.to(maths)).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float) -> Tensor:
    """RMS norm of x * silu(z), each group of `group_size` neighbouring channels by itself, times weight.

    The gate comes before the norm and the norm is by group, as in the Mamba-2 layers of Megatron-LM: a tensor-parallel
    rank that holds whole groups needs no other's. x, z [..., D], weight [D]. Returns x's shape and type; all between is
    fp32. Raises ShapeError.
    """
    D = x.shape[-1]
    check_shape("weight", weight, D=D)
    check_divides("channels", D, "group_size", group_size)
    maths = maths_dtype(x)
    gated = x.to(maths) * F.silu(z.to(maths))
    normed = _unit_rms(gated.unflatten(-1, (-1, group_size)), eps).flatten(-2)
    return (normed * weight.to(maths)).to(x.dtype)


class _UnitRms(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps). By hand, because autograd's backward takes about twice as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = scale * (dy - y * mean(y dy))."""
        (grad,), (y, scale) = grads, ctx.saved_tensors
        product = grad * y
        along = product.mean(-1, keepdim=True)
        return torch.mul(y, along, out=product).neg_().add_(grad).mul_(scale), None


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    return _UnitRms.apply(x, eps)  # pyright: ignore[reportReturnType]
