"""Quantized tensors as tensor cores take them: codes in bytes, and scales in the order in which they are read.

Sources: NVIDIA, cuBLAS 12.9, "1D block scaling factors layout" and "narrow precision data types usage"; PyTorch 2.13,
`scaled_mm`, for the shapes and strides of scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.precision.formats import FORMATS
from nemohybrid.precision.numerics import NVFP4_MAX, Quantized
from nemohybrid.precision.recipe import Operand

# M rows of an operand, K what a product sums over

TENSORWISE = "TensorWise"
WAYS = {
    ("current", False): TENSORWISE,
    ("delayed", False): TENSORWISE,
    ("block", False): "BlockWise1x128",
    ("block", True): "BlockWise128x128",
    ("mx", False): "BlockWise1x32",
    ("mx", True): "BlockWise1x32",
    ("nvfp4", False): "BlockWise1x16",
    ("nvfp4", True): "BlockWise1x16",
}
"""How an operand is scaled, and whether its blocks are square -> torch's name for its scales. MXFP8 and NVFP4 have a scale for
each row, also of a square block."""
MULTIPLES = {"current": 16, "delayed": 16, "block": 128, "mx": 32, "nvfp4": 32}
"""What rows and columns of an operand must be multiples of: cuBLAS takes 16 bytes at a time, and whole blocks; torch.compile
knows no shapes of results where blocks of 128 are cut."""


@dataclass(frozen=True)
class Packed:
    """codes [M, K] in FP8, or [M, K / 2] with two numbers of E2M1 in a byte; `ways`: torch's name for each of the scales. Without
    scales `codes` are plain numbers."""

    codes: Tensor
    scales: tuple[Tensor, ...] = ()
    ways: tuple[str, ...] = ()

    @property
    def is_swizzled(self) -> bool:
        return self.ways[0] in ("BlockWise1x32", "BlockWise1x16")

    @property
    def transposed(self) -> "Packed":
        """The same bytes, moved: with one scale for the tensor only."""
        assert self.ways == (TENSORWISE,)
        return Packed(self.codes.T.contiguous(), self.scales, self.ways)


def padded(x: Tensor, multiple: int) -> Tensor:
    """x [M, K] with zeros up to a multiple in both: they change no largest number, and add nothing."""
    M, K = x.shape
    return F.pad(x, (0, -K % multiple, 0, -M % multiple)) if M % multiple or K % multiple else x


def pack(of: Quantized, operand: Operand) -> Packed:
    """Of what the numerics made for an operand. Its values are numbers of the format, so that no cast rounds."""
    way = WAYS[operand.scaling, operand.square]
    if of.amax is not None:
        scales = swizzled(of.scale.to(torch.float8_e4m3fn)), of.amax / NVFP4_MAX
        return Packed(two_a_byte(of.values), scales, (way, TENSORWISE))
    dtype = FORMATS[operand.format].dtype
    assert dtype is not None
    return Packed(of.values.to(dtype).contiguous(), (arranged(of.scale, way),), (way,))


def arranged(scale: Tensor, way: str) -> Tensor:
    """The scales of a tensor in FP8."""
    match way:
        case "BlockWise1x128":
            return _column_major(scale)
        case "BlockWise128x128":
            return _column_major(F.pad(scale.T, (0, 0, 0, -scale.shape[1] % 4)))
        case "BlockWise1x32":
            return swizzled(scale.view(torch.float8_e8m0fnu))
    return scale


def _column_major(scale: Tensor) -> Tensor:
    """The same matrix, with neighbours of a column side by side; a matrix of one column has that stride too."""
    out = torch.empty_strided(scale.shape, (1, len(scale)), dtype=scale.dtype, device=scale.device)
    return out.copy_(scale)


def two_a_byte(values: Tensor) -> Tensor:
    """Numbers of E2M1 [M, K] in fp32 -> their codes [M, K / 2]: of two neighbours the first in the lower half of the byte."""
    magnitude = values.abs()
    small, large = magnitude * 2, magnitude * 0.5 + 4  # codes 0 to 3 are steps of 0.5, 6 and 7 are 4 and 6
    code = torch.where(magnitude < 2, small, torch.where(magnitude < 4, magnitude + 2, large))
    code = code.to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return (code[:, 0::2] | (code[:, 1::2] << 4)).contiguous().view(torch.float4_e2m1fn_x2)


def swizzled(scale: Tensor) -> Tensor:
    """Scales [M, C] of one byte -> [ceil(M / 128) ceil(C / 4) 512], tile by tile of 128 rows and 4 columns.

    In a tile the row r, column c is at 16 (r mod 32) + 4 (r div 32) + c; what is beyond the edge is zero.
    """
    M, C = scale.shape
    tiles = F.pad(scale.view(torch.uint8), (0, -C % 4, 0, -M % 128)).view(-(-M // 128), 4, 32, -(-C // 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)
