"""Which rank holds which experts, and what it means to bring tokens to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemohybrid.parallel.context import Group

# T own tokens, D hidden, K experts a token visits, N rows that came to this rank, k visits of a row

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [N, D], numbers of this rank's experts [N, k] int64, weights [N, k] fp32 -> what its experts add up to, [N, D].

An id equal to the number of experts of a rank means nobody: such a visit gives zero and gets zero gradient.
"""
Meanwhile = Callable[[], Tensor | None]
"""What is computed while tokens travel."""


@dataclass(frozen=True)
class Placement:
    """`experts` experts on a block of EP x ETP ranks: rank in the block = expert rank * `tensor` + tensor rank.

    Expert e is on expert rank e // `local`. Each of the `tensor` ranks there holds a part of its width, so that what
    they compute of a row are summands. Every rank of the block has its own tokens.
    """

    experts: int
    block: Group = Group()
    tensor: int = 1

    def __post_init__(self) -> None:
        assert self.block.size % self.tensor == 0, f"{self.block.size} ranks are not made of parts of {self.tensor}"
        assert self.experts % self.ranks == 0, f"{self.experts} experts cannot be shared by {self.ranks} expert ranks"

    @property
    def ranks(self) -> int:
        """Expert ranks, EP."""
        return self.block.size // self.tensor

    @property
    def local(self) -> int:
        """Experts of a rank, E / EP."""
        return self.experts // self.ranks

    @property
    def first(self) -> int:
        """The number of this rank's first expert."""
        return self.block.rank // self.tensor * self.local


class Dispatcher(Protocol):
    """Brings tokens to their experts and what these gave back to the tokens."""

    absent: bool = False
    """Whether `compute` may meet visits to nobody."""

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor, compute: Compute, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, D], ids [T, K] int64 of all experts, weights [T, K] fp32 -> the sum over the K visits of what the
        experts gave, [T, D] like x, and what `meanwhile` returned. Collective over the block, forward and backward.

        `meanwhile` runs after the tokens were sent and before they are waited for; in the backward pass its gradients
        are computed while those of the tokens travel. A token visits an expert at most once.
        """
        ...

    @property
    def overflow(self) -> Tensor | None:
        """Visits of this rank without room since `reset`, an int64 on the device; None where there is always room."""
        return None

    def reset(self) -> None:
        """Count `overflow` from zero."""

    def grow(self) -> None:
        """Make twice the room. Alike on all ranks of the block, between two steps."""
