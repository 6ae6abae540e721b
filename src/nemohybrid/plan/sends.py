"""Collectives as the formulas of `plan.communication` count them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

FP32 = INT32 = 4
INT64 = FP64 = 8

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
ROUNDS: dict[Kind, int] = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How often the parts of a tensor go around the ring."""


class Send(NamedTuple):
    """A collective that is repeated. size: bytes of the whole tensor; of an all_to_all, what goes from this rank to others."""

    kind: Kind
    size: int
    times: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that one of so many ranks sends, all times together."""
        rounds = 1 if self.kind == "all_to_all" else ROUNDS[self.kind] * (ranks - 1) / ranks
        return rounds * self.size * self.times


@dataclass(frozen=True)
class Row:
    """Collectives of one purpose and kind in a step. group: tensor, context, data (and context) or world; whole: bytes of all
    tensors together, of all_to_alls what goes to others."""

    what: str
    group: str
    kind: Kind
    ranks: int
    number: int
    whole: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return Send(self.kind, self.whole).sent(self.ranks)
