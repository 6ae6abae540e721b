"""relu(h)^2 in one pass of C++ each way, where PyTorch takes two and four."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.cpp import call, threads


def squared_relu_cpp(h: Tensor) -> Tensor:
    """As `nemohybrid_kernels.activation.squared_relu`, for bf16 and fp32 on a CPU."""
    return _SquaredRelu.apply(h)  # pyright: ignore[reportReturnType]


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        h = h.contiguous()
        y = torch.empty_like(h)
        call("squared_relu_forward", h, h, y, h.numel(), threads())
        ctx.save_for_backward(h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (h,), dy = ctx.saved_tensors, grads[0].contiguous()
        dh = torch.empty_like(h)
        call("squared_relu_backward", h, h, dy, dh, h.numel(), threads())
        return dh
