"""A fixed number of rows from every rank to every other: the host waits for nothing, at the price of empty rows."""

import math

import torch
from torch import Tensor

from nemohybrid.parallel.expert.placement import Compute, Dispatcher, Meanwhile, Placement
from nemohybrid.parallel.expert.routes import Routes, alone, arange, exchanged, loads, travel
from nemohybrid_kernels.moe.visits import Visits, sort_by_expert

# T own tokens, D hidden, K experts a token visits, n = T*K visits, P tensor ranks of an expert, R ranks of the block,
# S slots from one rank to another

GRAIN = 8
"""Slots come in multiples of it: rows of whole memory lines, and few different sizes."""


class Slots(Dispatcher):
    """`room` times the rows of an even load; what finds no slot is dropped, and counted in `overflow`.

    A step that overflowed is not to be used: reset, grow, and repeat it. A layer that is computed again counts again,
    so the number says whether, not how much. All ranks of the block must have equally many tokens. No shape depends on
    the ids, and the host reads nothing of the device.
    """

    absent = True

    def __init__(self, placement: Placement, room: float) -> None:
        assert room > 0, "no room means AllToAll"
        self.placement, self.room = placement, room
        self._overflow: Tensor | None = None

    @property
    def overflow(self) -> Tensor | None:
        """As `Dispatcher.overflow`; None before the first run."""
        return self._overflow

    def reset(self) -> None:
        """Count from zero. In place: what is recorded of the device keeps its address."""
        if self._overflow is not None:
            self._overflow.zero_()

    def grow(self) -> None:
        """Twice the room."""
        self.room *= 2

    def slots(self, tokens: int, visits_of_a_token: int) -> int:
        """S for this many own tokens; never more than can be needed, since a token visits an expert once."""
        wanted = math.ceil(self.room * tokens * visits_of_a_token / self.placement.ranks)
        return min(tokens * min(visits_of_a_token, self.placement.local), -(-wanted // GRAIN) * GRAIN)

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor, compute: Compute, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """As `Dispatcher.run`; R S rows come to a rank."""
        placement, slots = self.placement, self.slots(*ids.shape)
        if placement.block.size == 1:
            return alone(x, ids, weights, compute, meanwhile)
        visits = sort_by_expert(ids, placement.experts)
        mine = loads(visits, placement)
        theirs = exchanged(mine, placement)
        routes = _routes(visits, ids, mine, placement, slots)
        self._count(routes)
        return travel(routes, x, weights, lambda: _ids(theirs(), slots), compute, meanwhile)

    @torch.no_grad()
    def _count(self, routes: Routes) -> None:
        assert routes.lost is not None
        if self._overflow is None or self._overflow.device != routes.lost.device:
            self._overflow = torch.zeros((), dtype=torch.int64, device=routes.lost.device)
        self._overflow += routes.lost.sum()


def _routes(visits: Visits, ids: Tensor, mine: Tensor, placement: Placement, slots: int) -> Routes:
    """The first `slots` visits to each expert rank travel, in order of expert. An empty slot carries any row."""
    parts, ranks = placement.tensor, placement.block.size
    counts = mine.sum(1)[::parts]
    starts = counts.cumsum(0) - counts
    rank = ids.flatten() // placement.local
    slot = visits.place - starts.index_select(0, rank)
    lost = slot >= slots
    first = (rank * parts * slots + slot).masked_fill(lost, 0)
    rows = first[:, None] + arange(parts, ids) * slots
    places = starts[:, None, None] + arange(slots, ids).expand(1, parts, -1)
    visit = visits.order.index_select(0, places.flatten().clamp(max=ids.numel() - 1))
    equal = [slots] * ranks
    return Routes(placement.block, visit, rows.view(*ids.shape, parts), equal, equal, lost.view(*ids.shape, 1))


def _ids(theirs: Tensor, slots: int) -> Tensor:
    """Loads [R, E_local] of all sources -> the expert in each slot, [R S, 1]; E_local where it is empty."""
    slot = arange(slots, theirs).expand(len(theirs), -1).contiguous()
    return torch.searchsorted(theirs.cumsum(1), slot, right=True).view(-1, 1)
