"""Mixture of Representations (NVIDIA 2025, arXiv 2512.22804): FP8 where a tensor, or a block of it, is near enough to it.

The abstract says what is chosen and how often (98.4 % of tensors in FP8). The scales and rules below are from descriptions of
the paper, whose text could not be had; so the threshold is an option.
"""

import torch
from torch import Tensor

from nemohybrid.precision import numerics
from nemohybrid.precision.formats import E4M3, E5M2, FORMATS, power_of_2_below
from nemohybrid.precision.numerics import Quantized

BLOCK = 128
NORMAL_RANGE = {"e5m2": E5M2.max / 2.0**-14, "e4m3": E4M3.max / 2.0**-6}
"""The largest over the smallest normal number."""


def quantize_by_group(x: Tensor, fmt: str = "e4m3") -> Quantized:
    """One mantissa for the tensor and a power of two for each block of 128 x 128, such that none overflows.

    The scale of a tensor, max / amax = m 2^e, gives m; that of a block, m_b 2^e_b, gives 2^e_b, or half of that if m > m_b.
    """
    blocks = numerics.in_blocks(x.to(torch.float32), BLOCK, BLOCK)
    of_blocks = numerics.scale_to(numerics.largest_of(blocks), FORMATS[fmt], x.dtype)
    of_tensor = numerics.scale_to(numerics.largest(x), FORMATS[fmt], x.dtype)
    power = power_of_2_below(of_blocks)
    mantissa = of_tensor / power_of_2_below(of_tensor)
    scale = mantissa * torch.where(mantissa <= of_blocks / power, power, power / 2)
    values = numerics.whole(FORMATS[fmt].nearest(blocks * scale), x.shape)
    return Quantized(values, scale.reciprocal().squeeze(3).squeeze(1), BLOCK, BLOCK)


def relative_errors(x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """|x - q| / |x| of all that is not zero, zero elsewhere, [R, K]; and where that is."""
    there = x != 0
    return ((x - numbers).abs() / x.abs()).where(there, 0.0), there


def by_tensor(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """x [R, K] -> E4M3 if its mean relative error is below the threshold, else x; fp32; and the share accepted, 0 or 1."""
    exact = x.to(torch.float32)
    numbers = quantize_by_group(x).dequantize()
    errors, there = relative_errors(exact, numbers)
    accepted = errors.sum() / there.sum().clamp(min=1) < threshold
    return torch.where(accepted, numbers, exact), accepted.to(torch.float32)


def by_block(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] -> each block in E4M3 if that is nearer than E5M2, else in E5M2 if its numbers fit in there, else as it is;
    fp32; and the share of blocks in FP8."""
    exact = x.to(torch.float32)
    candidates = [quantize_by_group(x, fmt).dequantize() for fmt in ("e4m3", "e5m2")]
    of_e4m3, of_e5m2 = (
        _by_blocks(relative_errors(exact, numbers)[0]).sum((1, 3), keepdim=True) for numbers in candidates
    )
    magnitudes = _by_blocks(exact.abs())
    least = magnitudes.where(magnitudes > 0, torch.inf).amin((1, 3), keepdim=True)
    fits = numerics.largest_of(magnitudes) / least <= NORMAL_RANGE["e5m2"]  # 0 of infinity where a block is zero
    first, second = of_e4m3 < of_e5m2, fits
    blocks = [_by_blocks(numbers) for numbers in (*candidates, exact)]
    chosen = torch.where(first, blocks[0], torch.where(second, blocks[1], blocks[2]))
    return numerics.whole(chosen, x.shape), (first | second).to(torch.float32).mean()


def _by_blocks(x: Tensor) -> Tensor:
    return numerics.in_blocks(x, BLOCK, BLOCK)
