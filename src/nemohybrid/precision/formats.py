"""Numbers of four and eight bits: what they can hold, and how fp32 is rounded to them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A number format with a sign. `max` is its largest finite number; dtype: torch's, where it can cast to it."""

    name: str
    max: float
    smallest: float  # above zero
    dtype: torch.dtype | None = None

    def nearest(self, x: Tensor) -> Tensor:
        """x in fp32 -> the nearest numbers of the format, in fp32; ties to even, beyond `max` to `max`. NaN stays.

        Clamped first: torch casts what is too large to the largest number, infinity or NaN, as format and version have it.
        """
        x = x.clamp(-self.max, self.max)
        return _nearest_e2m1(x) if self.dtype is None else x.to(self.dtype).to(torch.float32)


E4M3 = Format("e4m3", 448.0, 2.0**-9, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 57344.0, 2.0**-16, torch.float8_e5m2)
E2M1 = Format("e2m1", 6.0, 0.5)
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M1)}
"""OCP 8-bit floating point (2023) and OCP Microscaling Formats (2023)."""


def _e2m1_step(magnitude: Tensor) -> Tensor:
    """The distance of neighbours at a magnitude: 0.5 below 2, 1 below 4, 2 from there."""
    return 0.5 + 0.5 * (magnitude >= 2.0) + (magnitude >= 4.0)


def _nearest_e2m1(x: Tensor) -> Tensor:
    """round() takes ties to the even multiple, which in each of the three ranges has the even code."""
    step = _e2m1_step(x.abs())
    return torch.round(x / step) * step


def stochastic_e2m1(x: Tensor, bits: Tensor) -> Tensor:
    """x in fp32, `bits` its random bytes, uint8 -> one of its two neighbours in E2M1, at random, so that the mean is x.

    The mean is off by at most 1/512 of the distance of neighbours, as there are only 256 different bytes.
    """
    magnitude = x.abs().clamp(max=E2M1.max)
    chance = (bits.to(torch.float32) + 0.5) * 2.0**-8
    reached = magnitude + chance * _e2m1_step(magnitude)
    step = _e2m1_step(reached)
    return (torch.floor(reached / step) * step).clamp(max=E2M1.max).copysign(x)


def exponent_rounded_up(x: Tensor) -> Tensor:
    """x >= 0 in fp32 -> the least E8M0 number that is no smaller, as its byte e, uint8: 2^(e - 127).

    0 for 0, and at most 254, as 255 is NaN. torch's own cast rounds to the nearest, with which blocks overflow.
    """
    pattern = x.view(torch.int32)
    exponent, mantissa = (pattern >> 23) & 0xFF, pattern & 0x7FFFFF
    subnormal = (exponent == 0) & (mantissa <= 0x400000)  # at most 2^-127, which has the byte 0
    up = (mantissa > 0) & (exponent < 254) & ~subnormal
    return (exponent + up).to(torch.uint8)


def of_exponent(byte: Tensor) -> Tensor:
    """E8M0 as fp32: 2^(byte - 127), with 2^-127 for 0."""
    return torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte.to(torch.int32) - 127)


def power_of_2_below(x: Tensor) -> Tensor:
    """x > 0 in fp32, its mantissa cleared: the largest power of two that is no larger."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)
