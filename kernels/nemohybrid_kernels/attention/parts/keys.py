"""What some queries look at, and how many scores of it are held at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES_AT_ONCE = 2**26
"""Scores, or places of a mask, that are held at a time: 256 MiB in fp32."""

# B rows, L queries, S keys, K key/value heads, P head dim


@dataclass(frozen=True)
class Keys:
    """Keys and values [B, K, S, P] that some queries look at, the documents of both, and how scores are made.

    of_queries [B, L], of_keys [B, S]: equal where a query may look; None: everywhere. causal: the queries are those of the
    same tokens, and look at no later one.
    """

    k: Tensor
    v: Tensor
    of_queries: Tensor | None = None
    of_keys: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    softcap: float | None = None

    @property
    def packed(self) -> bool:
        """Whether there are documents."""
        return self.of_queries is not None and self.of_keys is not None

    def hidden(self, place: slice) -> Tensor | None:
        """[B or 1, queries of this place, S], True where a query may not look; None: nowhere."""
        hidden = None
        if self.of_queries is not None and self.of_keys is not None:
            hidden = self.of_queries[:, place, None] != self.of_keys[:, None]
        if self.causal:
            index = torch.arange(self.k.shape[2], device=self.k.device)
            later = (index > index[place, None])[None]
            hidden = later if hidden is None else hidden | later
        return hidden


def places(queries: int, scores_each: int) -> Iterator[slice]:
    """Runs of queries of which each has so many scores, as long as may be held."""
    many = max(1, SCORES_AT_ONCE // max(1, scores_each))
    for first in range(0, queries, many):
        yield slice(first, min(first + many, queries))
