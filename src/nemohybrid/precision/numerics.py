"""Tensors in 8 and 4 bits: scales, blocks, rounding. The numbers are those of Transformer Engine, bit by bit.

All functions take a matrix x [R, K] in bf16 or fp32, quantize along K, the dimension that a product sums over, and compute
in fp32. A block at the edge may be smaller than others. The numbers are returned in fp32, not packed: what a GPU multiplies
in 4 bits can so be tried anywhere.

Sources: Transformer Engine 2.20, its reference quantizers; NVIDIA 2025 (arXiv 2509.25149, appendix B) for NVFP4; OCP
Microscaling Formats 1.0 for MXFP8.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.precision.formats import (
    E2M1,
    E4M3,
    FORMATS,
    Format,
    exponent_rounded_up,
    of_exponent,
    power_of_2_below,
    stochastic_e2m1,
)
from nemohybrid.precision.hadamard import hadamard as transformed

FP32_MAX = torch.finfo(torch.float32).max
NVFP4_MAX = E2M1.max * E4M3.max
"""The largest number of a tensor becomes this one: the largest code times the largest scale of a block."""


@dataclass(frozen=True)
class Quantized:
    """x is about `values * scale`, with a scale for each block of `rows` x `columns`; 0 means all.

    values [R, K] fp32: numbers of the format. scale: fp32 [1] for a tensor, [ceil(R / rows), ceil(K / columns)] for blocks,
    but a row for each of R where hardware wants that (NVFP4, MXFP8), with equal ones within a block. For MXFP8 it is the byte
    of E8M0, uint8. For NVFP4 numbers are also multiplied by amax / 2688, amax [1] being the largest of the tensor.
    """

    values: Tensor
    scale: Tensor
    rows: int = 0
    columns: int = 0
    amax: Tensor | None = None

    def dequantize(self) -> Tensor:
        """[R, K] fp32."""
        unscaled = self.without_amax()
        return unscaled if self.amax is None else unscaled * (self.amax / NVFP4_MAX)

    def without_amax(self) -> Tensor:
        """`values` times the scales of blocks: exact in bf16 for NVFP4, with 6 digits of 8."""
        scale = of_exponent(self.scale) if self.scale.dtype == torch.uint8 else self.scale
        if not self.columns:
            return self.values * scale
        rows = 1 if len(scale) == len(self.values) else self.rows
        scaled = in_blocks(self.values, rows, self.columns) * scale[:, None, :, None]
        return whole(scaled, self.values.shape)


def quantize_fp8_current(
    x: Tensor, fmt: str = "e4m3", power_of_2: bool = False, *, amax: Tensor | None = None
) -> Quantized:
    """One scale for the tensor, from its present largest number. amax [1]: that of a tensor of which x is a part."""
    amax = largest(x) if amax is None else amax
    scale = scale_to(amax, FORMATS[fmt], x.dtype, power_of_2)
    return _by_scale(x, scale, FORMATS[fmt])


def quantize_fp8(x: Tensor, fmt: str, scale: Tensor) -> Quantized:
    """By a scale [1] that is known before, as in delayed scaling. Beyond it numbers saturate."""
    return _by_scale(x, scale, FORMATS[fmt])


def _by_scale(x: Tensor, scale: Tensor, fmt: Format) -> Quantized:
    return Quantized(fmt.nearest(x.to(torch.float32) * scale), scale.reciprocal())


def quantize_fp8_block(x: Tensor, fmt: str = "e4m3", rows: int = 1, power_of_2: bool = True) -> Quantized:
    """A scale for each block of `rows` (1 or 128) x 128."""
    blocks = in_blocks(x.to(torch.float32), rows, 128)
    scale = scale_to(largest_of(blocks), FORMATS[fmt], x.dtype, power_of_2)
    values = whole(FORMATS[fmt].nearest(blocks * scale), x.shape)
    return Quantized(values, scale.reciprocal().squeeze(3).squeeze(1), rows, 128)


def quantize_mxfp8(x: Tensor, two_d: bool = False, fmt: str = "e4m3") -> Quantized:
    """A power of two for each 1 x 32, or 32 x 32, rounded up so that nothing overflows."""
    rows = 32 if two_d else 1
    blocks = in_blocks(x.to(torch.float32), rows, 32)
    byte = exponent_rounded_up(largest_of(blocks) * (1 / FORMATS[fmt].max))
    values = whole(FORMATS[fmt].nearest(torch.ldexp(blocks, 127 - byte.to(torch.int32))), x.shape)
    return Quantized(values, _a_row(byte, rows, len(x)), rows, 32)


def quantize_nvfp4(
    x: Tensor,
    block: str = "1x16",
    hadamard: bool = False,
    *,
    amax: Tensor | None = None,
    random: Tensor | None = None,
) -> Quantized:
    """E2M1 in blocks of 1 x 16 or 16 x 16, their scales in E4M3, and one in fp32 for the tensor.

    hadamard: x is transformed along K first, a multiple of 16. amax [1]: that of a tensor of which x is a part, after the
    transform. random: uint8 [R, K], with which rounding is stochastic.
    """
    rows = 16 if block == "16x16" else 1
    x = (transformed(x) if hadamard else x).to(torch.float32)
    amax = largest(x) if amax is None else amax
    factor = _quotient(NVFP4_MAX, amax).clamp(max=FP32_MAX).masked_fill(amax == 0, 1.0)
    blocks = in_blocks(x, rows, 16)
    scale = E4M3.nearest(largest_of(blocks) * (factor * (1 / 6)))
    encode = (scale * factor.reciprocal()).reciprocal().clamp(max=FP32_MAX)
    numbers = whole((blocks * encode).clamp(-E2M1.max, E2M1.max), x.shape)
    values = E2M1.nearest(numbers) if random is None else stochastic_e2m1(numbers, random)
    return Quantized(values, _a_row(scale, rows, len(x)), rows, 16, amax)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude, [1] fp32; 0 of nothing."""
    return x.abs().amax().to(torch.float32).view(1) if x.numel() else x.new_zeros(1, dtype=torch.float32)


def scale_to(amax: Tensor, fmt: Format, dtype: torch.dtype, power_of_2: bool = False) -> Tensor:
    """What takes amax to the format's largest number, in fp32; 1 where there is no such factor."""
    scale = _quotient(fmt.max, amax)
    scale = scale.masked_fill(scale == math.inf, torch.finfo(dtype).max)
    scale = power_of_2_below(scale) if power_of_2 else scale
    return scale.masked_fill((amax == 0) | ~amax.isfinite(), 1.0)


def _quotient(number: float, by: Tensor) -> Tensor:
    """A division. `number / tensor` is a product with the reciprocal in torch, whose last digit differs."""
    return torch.div(torch.tensor(number, dtype=torch.float32, device=by.device), by)


def in_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """[R, K] -> [R / rows, rows, K / columns, columns], with zeros up to whole blocks: they change no maximum."""
    R, K = x.shape
    if R % rows or K % columns:
        x = F.pad(x, (0, -K % columns, 0, -R % rows))
    return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def whole(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse."""
    return blocks.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def largest_of(blocks: Tensor) -> Tensor:
    """[.., 1, .., 1]."""
    return blocks.abs().amax((1, 3), keepdim=True)


def _a_row(scale: Tensor, rows: int, count: int) -> Tensor:
    """[R / rows, 1, K / columns, 1] -> [R, K / columns]."""
    return scale.expand(-1, rows, -1, -1).flatten(0, 1).squeeze(2)[:count]
