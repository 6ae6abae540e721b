"""The random Hadamard transform: 16 neighbours are mixed, so that an outlier becomes 16 moderate numbers.

Both operands of a product are transformed along the dimension that is summed over, where the transforms cancel.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""One vector for all layers and steps: that of Transformer Engine, NVIDIA 2025 (arXiv 2509.25149)."""


@cache
def _matrix(device: torch.device) -> Tensor:
    """diag(SIGNS) H / 4, of Sylvester's H: orthogonal. [16, 16] fp32."""
    H = torch.ones(1, 1)
    while len(H) < SIZE:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (torch.tensor(SIGNS, dtype=torch.float32)[:, None] * H / 4).to(device)


def hadamard(x: Tensor) -> Tensor:
    """x [..., K], K a multiple of 16 -> each 16 neighbours transformed, in x's type; computed in fp32."""
    blocks = x.unflatten(-1, (-1, SIZE)).to(torch.float32)
    return (blocks @ _matrix(x.device)).flatten(-2).to(x.dtype)


def filled_up(x: Tensor) -> Tensor:
    """x [M, K] -> [M, K up to a multiple of 16], with zeros: the transform spreads over them, and they must stay."""
    short = -x.shape[-1] % SIZE
    return F.pad(x, (0, short)) if short else x
