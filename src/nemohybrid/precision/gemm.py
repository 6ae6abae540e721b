"""How a matrix multiplies: the slot on every `Linear` that a precision recipe fills."""

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Gemm(Protocol):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out] in x's dtype; differentiable in all of them."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply."""
        ...


def plain_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in x's dtype, nothing quantized; the fp32 master weight is cast on the way, and again on the way back."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return _Cast.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


class _Cast(Function):
    """Keeps no cast of the weight: each microbatch that waits in a pipeline would keep one of all its weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, weight), (d_out,) = ctx.saved_tensors, gradients
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, d_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, d_out))
        return (
            d_out @ weight.to(x.dtype) if needs_x else None,
            (d_rows.T @ rows).to(weight.dtype) if needs_weight else None,
            d_rows.sum(0).to(ctx.bias_dtype) if needs_bias else None,
        )
