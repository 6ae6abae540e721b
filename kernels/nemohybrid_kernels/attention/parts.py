"""Attention over some of the keys, whose results for other keys can be joined to it: what a ring of ranks computes.

In plain PyTorch and for any device: scores are made for some queries at a time, in fp32, and never kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES_AT_ONCE = 2**26
"""Scores that are held at a time: 256 MiB in fp32."""

# B rows, H query heads, K key/value heads, R = H / K, L queries, S keys, P head dim


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

    def scores(self, q: Tensor, first: int) -> Tensor:
        """Queries [B, K, R, n, P] from number `first` on -> [B, K, R, n, S] in fp32 (fp64 of fp64); -inf where none may look."""
        scores = torch.einsum("bkrnp,bksp->bkrns", q, self.k.to(q.dtype)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = self._hidden(first, q.shape[3])
        return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)

    def _hidden(self, first: int, many: int) -> Tensor | None:
        """Broadcastable to [B, K, R, n, S]."""
        hidden = None
        if self.of_queries is not None and self.of_keys is not None:
            hidden = self.of_queries[:, first : first + many, None] != self.of_keys[:, None]
            hidden = hidden[:, None, None]
        if self.causal:
            index = torch.arange(self.k.shape[2], device=self.k.device)
            later = index > index[first : first + many, None]
            hidden = later if hidden is None else hidden | later
        return hidden


def part_of_attention(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """q [B, H, L, P] -> the softmax over these keys times their values [B, H, L, P], fp32, and the log of its sum [B, H, L].

    Zeros and -inf for a query that may look at none of them. No gradients.
    """
    out, sums = q.new_empty(q.shape, dtype=_maths(q)), q.new_empty(q.shape[:3], dtype=_maths(q))
    for place, rows in _at_once(q, keys):
        scores = keys.scores(rows, place.start)
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0)[..., None])
        out[:, :, place] = torch.einsum("bkrns,bksp->bkrnp", weights, keys.v.to(rows.dtype)).flatten(1, 2)
        sums[:, :, place] = total.flatten(1, 2)
    return out, sums


def join(out: Tensor, sums: Tensor, more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two results of `part_of_attention` over different keys -> that over all of them. The first must have seen some."""
    total = torch.logaddexp(sums, more[1])
    return out * torch.exp(sums - total)[..., None] + more[0] * torch.exp(more[1] - total)[..., None], total


def gradients_of_part(
    q: Tensor, keys: Keys, sums: Tensor, d_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of these keys and values, in fp32, in the attention over all keys.

    sums [B, H, L]: the log of the sum over all keys; delta [B, H, L]: the sum over P of d_out times the result.
    """
    dq = torch.empty_like(q, dtype=_maths(q))
    dk, dv = (torch.zeros_like(of, dtype=_maths(q)) for of in (keys.k, keys.v))
    heads = keys.k.shape[1]
    for place, rows in _at_once(q, keys):
        scores = keys.scores(rows, place.start)
        own = [x[:, :, place].unflatten(1, (heads, -1)).to(rows.dtype) for x in (sums, d_out, delta)]
        weights = torch.exp(scores - own[0][..., None])
        dv += torch.einsum("bkrns,bkrnp->bksp", weights, own[1])
        d_scores = weights * (torch.einsum("bkrnp,bksp->bkrns", own[1], keys.v.to(rows.dtype)) - own[2][..., None])
        if keys.softcap is not None:
            d_scores = d_scores * (1 - (scores.masked_fill(scores == -torch.inf, 0.0) / keys.softcap).square())
        dq[:, :, place] = (torch.einsum("bkrns,bksp->bkrnp", d_scores, keys.k.to(rows.dtype)) * keys.scale).flatten(
            1, 2
        )
        dk += torch.einsum("bkrns,bkrnp->bksp", d_scores, rows) * keys.scale
    return dq, dk, dv


def _maths(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _at_once(q: Tensor, keys: Keys) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries, as [B, K, R, n, P] in fp32."""
    rows = q.unflatten(1, (keys.k.shape[1], -1))
    many = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * keys.k.shape[2]))
    for first in range(0, q.shape[2], many):
        place = slice(first, min(first + many, q.shape[2]))
        yield place, rows[:, :, :, place].to(_maths(q))
