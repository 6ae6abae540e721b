"""Recipes on any device: operands are quantized, made numbers again, and multiplied. The reference for all other backends.

The product of two quantized numbers is exact in fp32, and so is their sum but for its order: a product made this way differs
from that of tensor cores by what adding up differs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.precision import mor, numerics
from nemohybrid.precision.hadamard import filled_up, hadamard
from nemohybrid.precision.numerics import NVFP4_MAX, Quantized
from nemohybrid.precision.recipe import GemmRecipe, Operand, Product
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
        if watch is not None:
            watch.accepted(slot, which, accepted)
        return Prepared(chosen)
    quantized = quantize(x, operand, slot, which, amax, random)
    if watch is not None:
        watch.quantized(slot, which, x, quantized, operand)
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


class EmulatedGemm:
    """A `Gemm` for one layer. Keeps the quantized weight while the weights are the same."""

    def __init__(self, recipe: GemmRecipe, slot: Slot) -> None:
        self.recipe, self.slot = recipe, slot
        self._weights: dict[tuple[Operand, bool], Prepared] = {}
        self._of: tuple[int, int, int] | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
        return _Multiply.apply(x, weight, bias, self, self.slot.clock.place)  # pyright: ignore[reportReturnType]

    def weight(self, weight: Tensor, operand: Operand, dtype: torch.dtype, transposed: bool) -> Prepared:
        """As operand of the forward product, or transposed, of that of dx."""
        if not operand.is_quantized:
            return Prepared((weight.T if transposed else weight).to(dtype))
        if transposed and operand.transposes:
            return self.weight(weight, operand, dtype, transposed=False).transposed
        now = self.slot.clock.weights, weight.data_ptr(), weight._version
        if self._of != now or not self.slot.keeps:
            self._weights, self._of = {}, now
        if (operand, transposed) not in self._weights:
            matrix = weight.detach().T if transposed else weight.detach()
            self._weights[operand, transposed] = prepare(matrix.to(dtype), operand, self.slot, "w")
        return self._weights[operand, transposed]


def operand_of(x: Tensor, operand: Operand, slot: Slot, which: str, what: str, place: tuple[int, int, int]) -> Prepared:
    """x [M, K], "x" or "dy", as the operand `what` of the six of a layer."""
    x = filled_up(x) if operand.hadamard else x
    return prepare(x, operand, slot, which, slot.random(x, operand, what, place))


def product(of: Product, left: Prepared, right: Prepared) -> Tensor:
    if of.left.is_quantized or of.right.is_quantized:
        return multiply(left, right)
    return left.matrix @ right.matrix.T


class _Multiply(Function):
    """Keeps its arguments: what is quantized is made again, from the same numbers with the same random bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gemm: EmulatedGemm,
        place: tuple[int, int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gemm, ctx.place, ctx.bias_dtype = gemm, place, None if bias is None else bias.dtype
        of, rows = gemm.recipe.fprop, x.reshape(-1, x.shape[-1])
        left = operand_of(rows, of.left, gemm.slot, "x", "fprop.x", place)
        y = product(of, left, gemm.weight(weight, of.right, x.dtype, transposed=False))
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, weight), (dy,), gemm, place = ctx.saved_tensors, gradients, ctx.gemm, ctx.place
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows, d_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, dy))
        dx = dweight = None
        if needs_x:
            of = gemm.recipe.dgrad
            left = operand_of(d_rows, of.left, gemm.slot, "dy", "dgrad.dy", place)
            dx = product(of, left, gemm.weight(weight, of.right, x.dtype, transposed=True)).to(x.dtype).view_as(x)
        if needs_weight:
            of = gemm.recipe.wgrad
            left = operand_of(d_rows.T, of.left, gemm.slot, "dy", "wgrad.dy", place)
            right = operand_of(rows.T, of.right, gemm.slot, "x", "wgrad.x", place)
            dweight = product(of, left, right).to(weight.dtype)
        dbias = d_rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, dweight, dbias, None, None
