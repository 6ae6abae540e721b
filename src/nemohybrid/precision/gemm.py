"""How a matrix multiplies: the slot on every `Linear` that a precision recipe fills."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Gemm(Protocol):
    """x [..., in], weight [out, in], bias [out] or None -> [..., out] in x's dtype; differentiable in all of them."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply."""
        ...


def plain_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in x's dtype, nothing quantized; the fp32 master weight is cast on the way."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
