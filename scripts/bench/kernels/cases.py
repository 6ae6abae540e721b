"""At which sizes the kernel benchmarks run, and on which tensors.

Sizes are those of Nemotron-H-8B (arXiv 2504.03624, table 1) where not said otherwise.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """One row of `tokens`. `packed`: of documents of unequal lengths."""

    tokens: int = 8192
    heads: int = 128
    width: int = 64
    state: int = 128
    groups: int = 8
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def __str__(self) -> str:
        groups = "1 group" if self.groups == 1 else f"{self.groups} groups"
        packed = ", packed" if self.packed else ""
        return f"{self.tokens} tokens, {self.heads} heads, {groups}, state {self.state}{packed}"


MAIN = Sizes()
TINY = Sizes(tokens=24, heads=2, width=16, state=16, groups=1, dtype=torch.float32)
"""For the interpreter, which takes bf16 for integers."""


def grid() -> list[Sizes]:
    """All sizes of the gate, those that differ least from `MAIN` first: where time is short, the last are left out."""
    whole = product((8192, 2048, 32768), (8, 1), (128, 64, 256), (False, True))
    found = [Sizes(tokens=t, groups=g, state=n, packed=p) for t, g, n, p in whole]
    found += [Sizes(tokens=t, heads=16, groups=1) for t in (8192, 2048, 32768)]  # one of 8 tensor-parallel ranks
    return sorted(found, key=_distance)


def bar(sizes: Sizes) -> float:
    """What mamba-ssm's time over ours must reach: forward and backward of the whole middle of a mixer."""
    return 1.3 if sizes == MAIN else 1.0


def _distance(sizes: Sizes) -> int:
    return sum(getattr(sizes, name) != getattr(MAIN, name) for name in ("tokens", "state", "groups", "packed"))


class Draw:
    """Random tensors of a benchmark: the same in every run on the same device."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return drawn.to(dtype or self.sizes.dtype)

    def columns(self, before: int, width: int, after: int) -> Tensor:
        """[1, T, width], out of a wider row as that of the projection is."""
        return self(1, self.sizes.tokens, before + width + after)[..., before : before + width]

    def per_head(self) -> dict[str, Tensor]:
        """Initial values as those of Mamba-2: A from -1 to -16, time steps from 0.1 to 0.001."""
        spread = torch.linspace(0, 1, self.sizes.heads, device=self.device)
        steps = 0.1 * 0.01**spread
        bias = steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus
        return {"dt_bias": bias, "A": -(16**spread), "D": torch.ones_like(spread)}

    def documents(self) -> dict[str, Tensor]:
        """Borders at a third of the row and near its end, within chunks; numbered from 0, as mamba-ssm wants it."""
        if not self.sizes.packed:
            return {}
        position = torch.arange(self.sizes.tokens, device=self.device)[None]
        borders = (self.sizes.tokens // 3 + 5, self.sizes.tokens * 9 // 10)
        return {"document_ids": sum((position >= border).int() for border in borders)}  # type: ignore[dict-item]
