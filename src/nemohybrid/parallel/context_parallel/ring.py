"""Attention of rows that ranks share: keys and values go round, and every rank has as much to do (arXiv 2310.01889).

A row is 2 c halves of a rank's tokens. In order, the last ranks would have all the work of a causal attention and the first
none; so rank r takes halves r and 2 c - 1 - r while it attends. Of the keys of another rank, a query then sees the first half
(ranks to the left) or with its second half all of them (ranks to the right): two squares of a half in every step. Going
back, keys and values go round once more, and their gradients with them. All travel while the next part is computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.moves import moved
from nemohybrid.parallel.expert.exchange import all_to_all
from nemohybrid_kernels.attention.parts import Keys, gradients_of_part, join, part_of_attention

# B rows, H query heads, K key/value heads, L tokens of a row on this rank (even), P head dim, c ranks


def balanced(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's run of the tokens along `dim` -> the two halves it takes in the ring. Differentiable."""
    plan = _Plan.of(group)
    halves = x.unflatten(dim, (2, -1)).movedim(dim, 0)
    came = moved(halves.flip(0) if plan.turned else halves, plan.sent, plan.received, group)
    return came.movedim(0, dim).flatten(dim, dim + 1)


def in_order(x: Tensor, dim: int, group: Group) -> Tensor:
    """The inverse of `balanced`."""
    plan = _Plan.of(group)
    came = moved(x.unflatten(dim, (2, -1)).movedim(dim, 0), plan.received, plan.sent, group)
    return (came.flip(0) if plan.turned else came).movedim(0, dim).flatten(dim, dim + 1)


@dataclass(frozen=True)
class _Plan:
    """Halves to and from each rank; turned: the later of two goes to a rank further left."""

    sent: list[int]
    received: list[int]
    turned: bool

    @classmethod
    def of(cls, group: Group) -> "_Plan":
        count, rank = group.size, group.rank
        goals = [half if half < count else 2 * count - 1 - half for half in (2 * rank, 2 * rank + 1)]
        sources = [rank // 2, (2 * count - 1 - rank) // 2]
        counts = ([halves.count(other) for other in range(count)] for halves in (goals, sources))
        return cls(*counts, turned=goals[0] > goals[1])


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    group: Group,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """q [B, H, L, P], k and v [B, K, L, P] of this rank's tokens -> causal attention over the whole rows, like q.

    segments [B, L]: numbers of documents that are their own in a whole row; None: one a row. Scores and sums are fp32.
    backend: of `nemohybrid_kernels.attention.parts`. Differentiable. Collective. Raises BackendError.
    """
    heads = q.shape[1], k.shape[1], v.shape[1]
    q, k, v = balanced(torch.cat([q, k, v], 1), 2, group).split(heads, 1)
    own = None if segments is None else balanced(segments, 1, group)
    return in_order(_Ring.apply(q, k, v, own, group, softcap, backend), 2, group)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Step:
    """The queries of this rank that see something of the keys of rank `source`, and which keys these are."""

    queries: slice
    keys: slice
    causal: bool

    @classmethod
    def of(cls, source: int, rank: int, length: int) -> "_Step":
        whole, half = slice(0, length), length // 2
        if source == rank:
            return cls(whole, whole, causal=True)
        return cls(whole, slice(0, half), False) if source < rank else cls(slice(half, length), whole, False)

    def seen(self, kv: Tensor, own: Tensor | None, theirs: Tensor | None, softcap: float | None) -> Keys:
        """kv [2, B, K, L, P] of the source, with the documents of both ranks."""
        k, v = kv[:, :, :, self.keys]
        of_queries = None if own is None else own[:, self.queries]
        of_keys = None if theirs is None else theirs[:, self.keys]
        return Keys(k, v, of_queries, of_keys, self.causal, k.shape[-1] ** -0.5, softcap)


class _Ring(Function):
    """`ring_attention` between `balanced` and `in_order`: own is the documents of this rank's halves. Keeps no scores."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Tensor | None,
        group: Group,
        softcap: float | None,
        backend: str,
    ) -> Tensor:
        kv, ctx.group, ctx.softcap, ctx.backend = torch.stack([k, v]), group, softcap, backend
        out = sums = None
        for source, there, theirs in _round(kv, own, group):
            step = _Step.of(source, group.rank, q.shape[2])
            part = part_of_attention(q[:, :, step.queries], step.seen(there, own, theirs, softcap), backend)
            if out is None or sums is None:
                out, sums = part  # its own tokens come first, of which every query sees one
            else:
                joined = join(out[:, :, step.queries], sums[:, :, step.queries], part)
                out[:, :, step.queries], sums[:, :, step.queries] = joined
        assert out is not None, "a ring has a rank"
        ctx.save_for_backward(q, kv, out.to(q.dtype), sums, own)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv, out, sums, own = ctx.saved_tensors
        d_out, group = gradients[0], ctx.group
        dq, d_kv, coming = torch.zeros_like(q, dtype=sums.dtype), torch.zeros_like(kv, dtype=sums.dtype), None
        for source, there, theirs in _round(kv, own, group):
            step = _Step.of(source, group.rank, q.shape[2])
            at, keys = step.queries, step.seen(there, own, theirs, ctx.softcap)
            mine, *whole = (x[:, :, at] for x in (q, out, sums, d_out))
            found = gradients_of_part(mine, keys, *whole, backend=ctx.backend)
            dq[:, :, at] += found[0]
            d_kv = d_kv if coming is None else coming()  # of ranks that had these keys before
            for gradient, more in zip(d_kv, found[1:], strict=True):
                gradient[:, :, step.keys] += more
            del found  # the next part has enough to hold
            coming = _send(d_kv, group)  # with what they are the gradients of; at last they are home
        assert coming is not None, "a ring has a rank"
        d_kv = coming()
        return dq.to(q.dtype), d_kv[0].to(kv.dtype), d_kv[1].to(kv.dtype), None, None, None, None


def _round(kv: Tensor, own: Tensor | None, group: Group) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(rank, its keys and values, its documents) of all ranks, from this one to the left. The next are sent meanwhile."""
    theirs = own
    for turn in range(group.size):
        last = turn == group.size - 1
        coming = None if last else (_send(kv, group), None if theirs is None else _send(theirs, group))
        yield (group.rank - turn) % group.size, kv, theirs
        if coming is not None:
            kv, theirs = coming[0](), None if coming[1] is None else coming[1]()


def _send(x: Tensor, group: Group) -> Callable[[], Tensor]:
    """To the right, round the ring -> what waits for that of the left."""
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sent, received = ([int(rank == other) for rank in range(group.size)] for other in (right, left))
    came = all_to_all(x[None], sent, received, group)
    return lambda: came()[0]
