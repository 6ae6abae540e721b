"""How a matrix multiplies: the slot on every `Linear` that a precision recipe fills."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

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


RECIPES: dict[str, Gemm] = {"bf16": plain_gemm}
"""Name in the configuration -> how every slot multiplies."""


@runtime_checkable
class GemmSlot(Protocol):
    """Anything that multiplies by a trained weight; `role` says which product it is (in_proj, qkv, fc1, ...)."""

    gemm: Gemm
    role: str


def bind(modules: Iterable[object], recipe: str) -> None:
    """Fill the slot of every module that has one."""
    for module in modules:
        if isinstance(module, GemmSlot):
            module.gemm = RECIPES[recipe]
