"""Every visit travels, and the host learns how many: nothing is dropped, no memory is wasted, one wait a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemohybrid.parallel.expert.placement import Compute, Dispatcher, Meanwhile, Placement
from nemohybrid.parallel.expert.routes import Routes, alone, arange, exchanged, loads, travel
from nemohybrid_kernels.moe.visits import Visits, sort_by_expert

# T own tokens, D hidden, K experts a token visits, n = T*K visits, P tensor ranks of an expert, R ranks of the block,
# N rows that came to this rank


class AllToAll(Dispatcher):
    """Exact: a row for every visit and every tensor rank of its expert, in the order of source and expert.

    Ranks may have different numbers of tokens, or none. On GPUs the host waits once a layer, for the 2 R numbers of
    rows to and from each rank; and once more where the layer is computed again.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor, compute: Compute, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher.run`. On the meta device every expert gets the same load: n P rows come to a rank."""
        placement = self.placement
        if placement.block.size == 1:
            return alone(x, ids, weights, compute, meanwhile)
        visits = sort_by_expert(ids, placement.experts)
        mine = loads(visits, placement)
        theirs = exchanged(mine, placement)()
        if x.is_meta:
            sent = received = _even(ids.numel(), placement)
        else:
            sent, received = torch.stack([mine.sum(1), theirs.sum(1)]).tolist()
        visit, rows = _tables(visits, ids, mine, placement)
        routes = Routes(placement.block, visit, rows, sent, received)
        here = _ids(theirs, sum(received))
        return travel(routes, x, weights, lambda: here, compute, meanwhile)


def _tables(visits: Visits, ids: Tensor, mine: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """`Routes.visit` [n P] and `Routes.rows` [T, K, P]: the visits to an expert rank in order of expert, P times."""
    parts = placement.tensor
    if parts == 1:
        return visits.order, visits.place.view(*ids.shape, 1)
    counts = mine.sum(1)[::parts]
    before = (counts.cumsum(0) - counts) * (parts - 1)  # copies of visits to the expert ranks before this one
    rank = ids.flatten() // placement.local
    part = arange(parts, ids)
    rows = (visits.place + before.index_select(0, rank))[:, None] + counts.index_select(0, rank)[:, None] * part
    visit = arange(ids.numel(), ids)[:, None].expand(-1, parts).reshape(-1)
    return torch.empty_like(visit).scatter_(0, rows.flatten(), visit), rows.view(*ids.shape, parts)


def _ids(theirs: Tensor, rows: int) -> Tensor:
    """Loads [R, E_local] of all sources -> the expert of each row that comes, [N, 1]."""
    ends = theirs.flatten().cumsum(0)
    return (torch.searchsorted(ends, arange(rows, theirs), right=True) % theirs.shape[1])[:, None]


def _even(visits: int, placement: Placement) -> Sequence[int]:
    """`visits` shared evenly by the expert ranks, and as many to each of their tensor ranks."""
    few, more = divmod(visits, placement.ranks)
    return [few + (rank < more) for rank in range(placement.ranks) for _ in range(placement.tensor)]
