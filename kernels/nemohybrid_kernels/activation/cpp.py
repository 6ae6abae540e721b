"""relu(h)^2 in one pass of C++ each way, where PyTorch takes two and four."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.cpp import call, threads
from nemohybrid_kernels.opaque import opaque


def squared_relu_cpp(h: Tensor) -> Tensor:
    """As `nemohybrid_kernels.activation.squared_relu`, for bf16 and fp32 on a CPU."""
    return _SquaredRelu.apply(h)  # pyright: ignore[reportReturnType]


def _like(h: Tensor, *rest: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@opaque("cpp_squared_relu", like=_like)
def _forward(h: Tensor) -> Tensor:
    h = h.contiguous()
    y = torch.empty_like(h)
    call("squared_relu_forward", h, h, y, h.numel(), threads())
    return y


@opaque("cpp_squared_relu_backward", like=_like)
def _backward(h: Tensor, dy: Tensor) -> Tensor:
    h, dy = h.contiguous(), dy.contiguous()
    dh = torch.empty_like(h)
    call("squared_relu_backward", h, h, dy, dh, h.numel(), threads())
    return dh


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        ctx.save_for_backward(h)
        return _forward(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(*ctx.saved_tensors, grads[0])
