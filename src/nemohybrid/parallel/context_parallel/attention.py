"""Attention of rows that ranks share, every rank having all tokens of some of the heads."""

from collections.abc import Callable

from torch import Tensor

from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.heads import to_heads, to_tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, H, L, P], k and v [B, K, L, P] -> like q."""


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor, attend: Attend, group: Group) -> Tensor:
    """q [B, H, L, P], k and v [B, K, L, P] of this rank's tokens -> like q.

    The query heads divide by the ranks; key/value heads do, or the ranks by them, which then repeat them. Differentiable.
    """
    parts = [(x.transpose(1, 2).flatten(2), x.shape[1]) for x in (q, k, v)]
    here = (x.unflatten(-1, (-1, q.shape[3])).transpose(1, 2) for x in to_heads(parts, group))
    return to_tokens(attend(*here).transpose(1, 2).flatten(2), group).unflatten(-1, (-1, q.shape[3])).transpose(1, 2)
