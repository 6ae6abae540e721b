"""Recipes by torch's own products of narrow numbers: `scaled_mm`, on CPUs for one scale a tensor, on GPUs as they can.

The bytes are those of the numerics. A product differs from the emulated one by how its sum is rounded: in fp32 on a CPU, and on
a GPU with the accumulators of its tensor cores, from which Hopper moves to fp32 every 128 numbers as `use_fast_accum` is off.
In a graph of torch.compile, which keeps fp32 where others round to bf16 on the way, what is quantized may differ in its last
digit, and so may its bytes; torch._inductor.config.emulate_precision_casts forbids it.
Stacked experts are not here: torch's grouped product (2.13) takes E4M3 only, and gradients are E5M2.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.precision import numerics
from nemohybrid.precision.backends.emulated import quantize
from nemohybrid.precision.backends.layer import LayerGemm
from nemohybrid.precision.backends.packed import MULTIPLES, TENSORWISE, WAYS, Packed, arranged, pack, padded
from nemohybrid.precision.formats import FORMATS, Format
from nemohybrid.precision.recipe import GemmRecipe, Operand, Product
from nemohybrid.precision.slot import Slot

# M, N rows of the two operands, K what a product sums over


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
        watch.quantized(slot.name, which, x, quantized, operand)
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


class NativeGemm(LayerGemm[Packed]):
    """A `Gemm` for one layer. Of x it keeps the bytes where they serve the product for dW, x itself elsewhere."""

    def __init__(self, recipe: GemmRecipe, slot: Slot) -> None:
        super().__init__(recipe, slot)
        self.keeps_x = _same_bytes(recipe.fprop.left, recipe.wgrad.right)
        self.keeps_dy = _same_bytes(recipe.dgrad.left, recipe.wgrad.left)

    def prepare(self, x: Tensor, operand: Operand, which: str, random: Tensor | None = None) -> Packed:
        """x [M, K] as it is multiplied."""
        return prepare(x, operand, self.slot, which, random) if operand.is_quantized else Packed(x)

    def product(
        self,
        of: Product,
        left: Packed,
        right: Packed,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Of two operands, without the zeros that they were filled up with."""
        if not left.scales:
            y = left.codes @ right.codes.T
            return (y if bias is None else y + bias).to(dtype)
        more = len(right.codes) - shape[1]
        bias = F.pad(bias, (0, more)) if bias is not None and more else bias
        return scaled_product(left, right, dtype, bias)[: shape[0], : shape[1]]

    def turns(self, operand: Operand) -> bool:
        """With one scale for the tensor. The scales of blocks lie otherwise."""
        return WAYS.get((operand.scaling, operand.square)) == TENSORWISE

    def kept(self, rows: Tensor, left: Packed) -> tuple[Tensor, ...]:
        """Bytes and their scale, or x."""
        return (left.codes, *left.scales) if self.keeps_x else (rows,)

    def x_of_wgrad(self, kept: tuple[Tensor, ...], place: tuple[int, int, int]) -> Packed:
        """From what was kept."""
        if not self.keeps_x:
            return super().x_of_wgrad(kept, place)
        codes, scale = kept
        return Packed(codes, (scale,), (TENSORWISE,)).transposed


def _same_bytes(one: Operand, other: Operand) -> bool:
    """Whether a tensor and its transpose, as operands of two products, have the same bytes and scale."""
    return one == other and WAYS.get((one.scaling, one.square)) == TENSORWISE
