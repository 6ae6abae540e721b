"""Recipes on any device: operands are quantized, made numbers again, and multiplied. The reference for all other backends.

The product of two quantized numbers is exact in fp32, and so is their sum but for its order: a product made this way differs
from that of tensor cores by what adding up differs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemohybrid.precision import mor, numerics
from nemohybrid.precision.backends.layer import LayerGemm
from nemohybrid.precision.hadamard import filled_up, hadamard
from nemohybrid.precision.numerics import NVFP4_MAX, Quantized
from nemohybrid.precision.recipe import Operand, Product
from nemohybrid.precision.slot import Amax, Slot

# T tokens, I inputs, O outputs of a layer; M rows of an operand, K what a product sums over


class Prepared(NamedTuple):
    """An operand [M, K], which `factor` [1], where there is one, multiplies."""

    matrix: Tensor
    factor: Tensor | None = None

    @property
    def transposed(self) -> "Prepared":
        return Prepared(self.matrix.T, self.factor)


def multiply(left: Prepared, right: Prepared) -> Tensor:
    """left [M, K], right [N, K] -> left right^T [M, N] in fp32."""
    a, b = left.matrix, right.matrix.T
    if a.dtype == torch.float32 or a.device.type != "cuda":
        out = a.float() @ b.float()
    else:
        out = torch.mm(a, b, out_dtype=torch.float32)
    for factor in (left.factor, right.factor):
        out = out if factor is None else out.mul_(factor)
    return out


def prepare(x: Tensor, operand: Operand, slot: Slot, which: str, random: Tensor | None = None) -> Prepared:
    """x [M, K] as it is multiplied. which: "x", "w" or "dy"; random: see `quantize_nvfp4`."""
    watch, amax = slot.clock.watch, slot.parts.get(which)
    if not operand.is_quantized:
        return Prepared(hadamard(x) if operand.hadamard else x)
    if operand.scaling in ("mor", "mor_block"):
        chosen, accepted = mor.by_tensor(x, operand.threshold) if operand.scaling == "mor" else mor.by_block(x)
        if watch is not None and x.numel():
            watch.accepted(slot.name, which, accepted)
        return Prepared(chosen)
    quantized = quantize(x, operand, slot, which, amax, random)
    if watch is not None:
        watch.quantized(slot.name, which, x, quantized, operand)
    return numbers(quantized)


def quantize(
    x: Tensor, operand: Operand, slot: Slot, which: str, amax: Amax | None = None, random: Tensor | None = None
) -> Quantized:
    """x [M, K] by the numerics that an operand names. amax: over the ranks that hold its parts."""
    if operand.scaling == "nvfp4" and operand.hadamard:
        x = hadamard(x)
    largest = None if amax is None else amax(numerics.largest(x))
    match operand.scaling:
        case "current":
            return numerics.quantize_fp8_current(x, operand.format, operand.power_of_2, amax=largest)
        case "delayed":
            assert slot.scales is not None, "a slot of delayed scaling has scales"
            return numerics.quantize_fp8(x, operand.format, slot.scales.scale_of(which, x))
        case "block":
            return numerics.quantize_fp8_block(x, operand.format, 128 if operand.square else 1, operand.power_of_2)
        case "mx":
            return numerics.quantize_mxfp8(x, operand.square, operand.format)
        case "nvfp4":
            return numerics.quantize_nvfp4(x, "16x16" if operand.square else "1x16", amax=largest, random=random)
    raise AssertionError(f"{operand.scaling} has no numerics of its own")


def numbers(of: Quantized) -> Prepared:
    """What is multiplied: in bf16 on a GPU, which holds values and scales of blocks exactly; the rest is a factor."""
    on_gpu = of.values.device.type == "cuda"
    if of.amax is not None:
        return Prepared(_narrow(of.without_amax(), on_gpu), of.amax / NVFP4_MAX)
    if not of.columns:
        return Prepared(_narrow(of.values, on_gpu), of.scale)
    return Prepared(of.dequantize())


def _narrow(x: Tensor, on_gpu: bool) -> Tensor:
    return x.to(torch.bfloat16) if on_gpu else x


class EmulatedGemm(LayerGemm[Prepared]):
    """A `Gemm` for one layer. Keeps x itself: what is quantized is made again in the backward pass."""

    def prepare(self, x: Tensor, operand: Operand, which: str, random: Tensor | None = None) -> Prepared:
        """x [M, K] as it is multiplied."""
        return prepare(x, operand, self.slot, which, random)

    def product(
        self,
        of: Product,
        left: Prepared,
        right: Prepared,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Of two operands, which nobody fills up."""
        y = product(of, left, right)
        return (y if bias is None else y + bias).to(dtype)

    def turns(self, operand: Operand) -> bool:
        """Whether the transpose has the same numbers."""
        return operand.transposes


def operand_of(x: Tensor, operand: Operand, slot: Slot, which: str, what: str, place: tuple[int, int, int]) -> Prepared:
    """x [M, K], "x" or "dy", as the operand `what` of the six of a layer."""
    x = filled_up(x) if operand.hadamard else x
    return prepare(x, operand, slot, which, slot.random(x, operand, what, place))


def product(of: Product, left: Prepared, right: Prepared) -> Tensor:
    if of.left.is_quantized or of.right.is_quantized:
        return multiply(left, right)
    return left.matrix @ right.matrix.T
