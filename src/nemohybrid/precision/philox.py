"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random bits that are a function.

The same key and counter give the same bits on every device, in any order, as often as they are asked for. So a resumed run
and a layer that is computed again draw what they drew.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four words of 32 bits, in int64, to each counter of four; a key is two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower word. int64 wraps around, and a shift fills in its sign, which is masked."""
    product = x * by
    return (product >> 32) & _WORD, product & _WORD


def random_bytes(shape: torch.Size, key: tuple[int, int], place: tuple[int, int, int], device: torch.device) -> Tensor:
    """uint8 [shape], 16 of them a counter, whose first word counts and whose others are `place`."""
    n = shape.numel()
    index = torch.arange(-(-n // 16), dtype=torch.int64, device=device)
    c1, c2, c3 = (torch.full_like(index, word & _WORD) for word in place)
    words = torch.stack(philox((index, c1, c2, c3), key), 1)
    return words.to(torch.uint32).view(torch.uint8).flatten()[:n].view(shape)
