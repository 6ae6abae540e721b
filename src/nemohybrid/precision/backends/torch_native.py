"""Recipes by torch's own products of narrow numbers: `scaled_mm`, on CPUs for one scale a tensor, on GPUs as they can.

The bytes are those of the numerics. A product differs from the emulated one by how its sum is rounded: in fp32 on a CPU, and on
a GPU with the accumulators of its tensor cores, from which Hopper moves to fp32 every 128 numbers as `use_fast_accum` is off.
In a graph of torch.compile, which keeps fp32 where others round to bf16 on the way, what is quantized may differ in its last
digit, and so may its bytes; torch._inductor.config.emulate_precision_casts forbids it.
Stacked experts are not here: torch's grouped product (2.13) takes E4M3 only, and gradients are E5M2.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.precision import numerics
from nemohybrid.precision.backends.emulated import quantize
from nemohybrid.precision.backends.packed import MULTIPLES, TENSORWISE, WAYS, Packed, arranged, pack, padded
from nemohybrid.precision.formats import FORMATS, Format
from nemohybrid.precision.hadamard import filled_up
from nemohybrid.precision.recipe import GemmRecipe, Operand
from nemohybrid.precision.slot import Slot

# T tokens, I inputs, O outputs of a layer; M, N rows of the two operands, K what a product sums over

NOWHERE = 0, 0, 0


def scaled_product(
    left: Packed, right: Packed, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """left [M, K], right [N, K] -> left right^T + bias [M, N], in fp32, rounded once to `dtype`.

    fast: on Hopper FP8 is summed in the accumulators of its tensor cores to the end, which keep 14 bits. Only a benchmark asks.
    """
    if bias is None:
        return _scaled_mm(left, right, dtype, fast)
    return (_scaled_mm(left, right, torch.float32, fast) + bias).to(dtype)


def _scaled_mm(left: Packed, right: Packed, dtype: torch.dtype, fast: bool) -> Tensor:
    a, b = left.codes, right.codes.T
    if not hasattr(F, "scaled_mm"):  # before torch 2.10
        (scale_a,), (scale_b,) = left.scales, right.scales
        multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return multiply(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    return F.scaled_mm(
        a,
        b,
        list(left.scales),
        [getattr(F.ScalingType, way) for way in left.ways],
        list(right.scales),
        [getattr(F.ScalingType, way) for way in right.ways],
        swizzle_a=_swizzles(left),
        swizzle_b=_swizzles(right),
        output_dtype=dtype,
        use_fast_accum=fast,
    )


def _swizzles(of: Packed) -> "list[F.SwizzleType]":
    first = F.SwizzleType.SWIZZLE_32_4_4 if of.is_swizzled else F.SwizzleType.NO_SWIZZLE
    return [first, *(F.SwizzleType.NO_SWIZZLE for _ in of.ways[1:])]


def prepare(x: Tensor, operand: Operand, slot: Slot, which: str, random: Tensor | None = None) -> Packed:
    """x [M, K] as it is multiplied, M and K with zeros up to multiples. which: "x", "w" or "dy"; random [M, K]: see
    `quantize_nvfp4`."""
    multiple, watch = MULTIPLES[operand.scaling], slot.clock.watch
    x, random = padded(x.detach(), multiple), None if random is None else padded(random, multiple)
    if operand.scaling in ("current", "delayed", "block") and watch is None:
        return _in_two_kernels(x, operand, slot, which)
    quantized = quantize(x, operand, slot, which, slot.parts.get(which), random)
    if watch is not None:
        watch.quantized(slot, which, x, quantized, operand)
    return pack(quantized, operand)


def _in_two_kernels(x: Tensor, operand: Operand, slot: Slot, which: str) -> Packed:
    """FP8 as the numerics make it, but on a GPU with one kernel for what is largest, and one for the bytes."""
    fmt, way = FORMATS[operand.format], WAYS[operand.scaling, operand.square]
    if operand.scaling == "block":
        rows = 128 if operand.square else 1
        largest = _fast(_largest_of_blocks, x)(x, rows)
        scale = numerics.scale_to(largest, fmt, x.dtype, operand.power_of_2)
        codes, inverse = _fast(_codes_of_blocks, x)(x, scale, fmt, rows), scale.reciprocal().squeeze(3).squeeze(1)
        return Packed(codes, (arranged(inverse, way),), (way,))
    if operand.scaling == "delayed":
        assert slot.scales is not None, "a slot of delayed scaling has scales"
        scale = slot.scales.scale_of(which, x)
    else:
        amax = _fast(numerics.largest, x)(x)
        amax = slot.parts[which](amax) if which in slot.parts else amax
        scale = numerics.scale_to(amax, fmt, x.dtype, operand.power_of_2)
    return Packed(_fast(_codes, x)(x, scale, fmt), (scale.reciprocal(),), (way,))


def _codes(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    assert fmt.dtype is not None
    return (x.to(torch.float32) * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).contiguous()


def _largest_of_blocks(x: Tensor, rows: int) -> Tensor:
    return numerics.largest_of(numerics.in_blocks(x.to(torch.float32), rows, 128))


def _codes_of_blocks(x: Tensor, scale: Tensor, fmt: Format, rows: int) -> Tensor:
    return numerics.whole(_codes(numerics.in_blocks(x, rows, 128), scale, fmt), x.shape).contiguous()


def _fast(function: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """The function for x, one kernel on a GPU. Only what rounds nothing or once may be given: compilers divide inexactly."""
    return function if x.device.type != "cuda" or torch.compiler.is_compiling() else _compiled(function)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


class NativeGemm:
    """A `Gemm` for one layer. Keeps the bytes of the weight while the weights are the same."""

    def __init__(self, recipe: GemmRecipe, slot: Slot) -> None:
        self.recipe, self.slot = recipe, slot
        self._weights: dict[tuple[Operand, bool], Packed] = {}
        self._of: tuple[int, int, int] | None = None
        self.keeps_x = _same_bytes(recipe.fprop.left, recipe.wgrad.right)
        self.keeps_dy = _same_bytes(recipe.dgrad.left, recipe.wgrad.left)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
        # Where nothing depends on the step, a graph must not: it would be made anew for each.
        place = self.slot.clock.place if self.recipe.is_stochastic else NOWHERE
        return _Multiply.apply(x, weight, bias, self, place)  # pyright: ignore[reportReturnType]

    def weight(self, weight: Tensor, operand: Operand, dtype: torch.dtype, transposed: bool) -> Packed:
        """As operand of the forward product, or transposed, of that of dx."""
        if not operand.is_quantized:
            return Packed((weight.T if transposed else weight).to(dtype))
        if torch.compiler.is_compiling():  # a graph keeps nothing
            return self._packed(weight.detach().to(dtype), operand, transposed)
        now = self.slot.clock.weights, weight.data_ptr(), weight._version
        if self._of != now or not self.slot.keeps:
            self._weights, self._of = {}, now
        if (operand, transposed) not in self._weights:
            self._weights[operand, transposed] = self._packed(weight.detach().to(dtype), operand, transposed)
        return self._weights[operand, transposed]

    def _packed(self, weight: Tensor, operand: Operand, transposed: bool) -> Packed:
        if not transposed:
            return prepare(weight, operand, self.slot, "w")
        if WAYS[operand.scaling, operand.square] == TENSORWISE and (operand, False) in self._weights:
            return self._weights[operand, False].transposed
        return prepare(weight.T, operand, self.slot, "w")  # square blocks are the same ones

    def operand(self, x: Tensor, operand: Operand, which: str, what: str, place: tuple[int, int, int]) -> Packed:
        """Of x or dy, `what` of the six operands of a layer it is."""
        if not operand.is_quantized:
            return Packed(x)
        x = filled_up(x) if operand.hadamard else x
        return prepare(x, operand, self.slot, which, self.slot.random(x, operand, what, place))


def _same_bytes(one: Operand, other: Operand) -> bool:
    """Whether a tensor and its transpose, as operands of two products, have the same bytes and scale."""
    return one == other and WAYS.get((one.scaling, one.square)) == TENSORWISE


def _product(
    left: Packed, right: Packed, dtype: torch.dtype, shape: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    """[M, N] in dtype, without the zeros that were added."""
    if not left.scales:
        y = left.codes @ right.codes.T
        return (y if bias is None else y + bias).to(dtype)
    more = len(right.codes) - shape[1]
    bias = F.pad(bias, (0, more)) if bias is not None and more else bias
    return scaled_product(left, right, dtype, bias)[: shape[0], : shape[1]]


class _Multiply(Function):
    """Keeps the weight, and of x its bytes where they serve the product for dW, x itself elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gemm: NativeGemm, place: tuple[int, int, int]
    ) -> Tensor:
        of, rows = gemm.recipe.fprop, x.reshape(-1, x.shape[-1])
        left = gemm.operand(rows, of.left, "x", "fprop.x", place)
        right = gemm.weight(weight, of.right, x.dtype, transposed=False)
        y = _product(left, right, x.dtype, (len(rows), len(weight)), bias)
        ctx.save_for_backward(weight, *((left.codes, *left.scales) if gemm.keeps_x else (rows,)))
        ctx.gemm, ctx.place, ctx.shape, ctx.bias_dtype = gemm, place, x.shape, None if bias is None else bias.dtype
        return y.reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight, *kept), (dy,), gemm = ctx.saved_tensors, gradients, ctx.gemm
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        (O, I), d_rows, of = weight.shape, dy.reshape(-1, dy.shape[-1]), gemm.recipe
        dx = dweight = None
        left = Packed(d_rows)
        if needs_x or gemm.keeps_dy:
            left = gemm.operand(d_rows, of.dgrad.left, "dy", "dgrad.dy", ctx.place)
        if needs_x:
            right = gemm.weight(weight, of.dgrad.right, dy.dtype, transposed=True)
            dx = _product(left, right, dy.dtype, (len(d_rows), I)).reshape(ctx.shape)
        if needs_weight:
            if gemm.keeps_dy:
                left = left.transposed
            else:
                left = gemm.operand(d_rows.T, of.wgrad.left, "dy", "wgrad.dy", ctx.place)
            if gemm.keeps_x:
                right = Packed(kept[0], (kept[1],), (TENSORWISE,)).transposed
            else:
                right = gemm.operand(kept[0].T, of.wgrad.right, "x", "wgrad.x", ctx.place)
            dweight = _product(left, right, weight.dtype, (O, I))
        dbias = d_rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, dweight, dbias, None, None
