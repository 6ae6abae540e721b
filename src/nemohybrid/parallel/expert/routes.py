"""Tables that say which visit travels in which row. Both ways are gathers: adding by atomics has no fixed order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemohybrid.parallel.context import Group
from nemohybrid.parallel.expert.exchange import Pending, Trip, all_to_all, arrive, launch
from nemohybrid.parallel.expert.placement import Compute, Meanwhile, Placement
from nemohybrid_kernels.moe.visits import Visits

# T own tokens, D hidden, K experts a token visits, n = T*K visits, P tensor ranks of an expert; M rows sent, N received


@dataclass(frozen=True)
class Routes:
    """The rows that this rank sends and receives. A visit travels to all P ranks of its expert."""

    group: Group
    visit: Tensor  # [M] int64: the visit in each row that is sent; visit t*K + k is that of token t to its k-th expert
    rows: Tensor  # [T, K, P] int64: the rows in which each visit travels
    sent: Sequence[int]  # rows to each rank of the group
    received: Sequence[int]  # rows from each
    lost: Tensor | None = None  # [T, K, 1] bool: visits that do not travel, whose `rows` mean nothing

    def outward(self) -> Trip:
        """Tokens x [T, D] and weights [T, K] -> rows [N, D] and [N, 1]."""
        return Trip(self._spread, self._collected)

    def homeward(self) -> Trip:
        """Rows [N, D] -> for each token the sum over its visits and their P summands, [T, D]."""
        return Trip(lambda out: self._waiting(self._home(out), self._by_token), self._copies)

    def _spread(self, x: Tensor, weights: Tensor) -> Pending:
        rows, of_visits = self._out(self._of_tokens(x)), self._out(weights.reshape(-1, 1).index_select(0, self.visit))
        return lambda: (rows(), of_visits())

    def _collected(self, d_rows: Tensor, d_weights: Tensor) -> Pending:
        rows, of_visits = self._home(d_rows), self._home(d_weights)
        return lambda: (self._by_token(rows()), self._gathered(of_visits()).sum((2, 3)))

    def _copies(self, d_out: Tensor) -> Pending:
        rows = self._out(self._of_tokens(d_out))
        return lambda: (rows(),)

    @staticmethod
    def _waiting(rows: Callable[[], Tensor], then: Callable[[Tensor], Tensor]) -> Pending:
        return lambda: (then(rows()),)

    def _of_tokens(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.visit // self.rows.shape[1])

    def _by_token(self, rows: Tensor) -> Tensor:
        return self._gathered(rows).flatten(1, 2).sum(1)

    def _gathered(self, rows: Tensor) -> Tensor:
        gathered = rows.index_select(0, self.rows.flatten()).view(*self.rows.shape, rows.shape[1])
        return gathered if self.lost is None else gathered.masked_fill_(self.lost[..., None], 0)

    def _out(self, rows: Tensor) -> Callable[[], Tensor]:
        return all_to_all(rows, self.sent, self.received, self.group)

    def _home(self, rows: Tensor) -> Callable[[], Tensor]:
        return all_to_all(rows, self.received, self.sent, self.group)


class Ways(Protocol):
    """Where tokens [T, D] and weights [T, K] go, as rows [N, D] and [N, 1], and what comes back of these, [T, D]."""

    def outward(self) -> Trip: ...
    def homeward(self) -> Trip: ...


def travel(
    ways: Ways, x: Tensor, weights: Tensor, ids: Callable[[], Tensor], compute: Compute, meanwhile: Meanwhile
) -> tuple[Tensor, Tensor | None]:
    """There and back, as `Dispatcher.run` says. `ids`, called when rows are there: [N, 1] of this rank's experts."""
    outward, homeward = ways.outward(), ways.homeward()
    ticket = launch(outward, x, weights)
    beside = meanwhile()
    rows, of_visits = arrive(outward, ticket)
    out = compute(rows, ids(), of_visits)
    return arrive(homeward, launch(homeward, out))[0], beside


def loads(visits: Visits, placement: Placement) -> Tensor:
    """[R, E_local] int32: the visits that each rank of the block gets of this one, by expert."""
    counts = visits.ends.diff(prepend=visits.ends.new_zeros(1)).view(placement.ranks, 1, placement.local)
    return counts.expand(-1, placement.tensor, -1).reshape(placement.block.size, placement.local)


def exchanged(loads: Tensor, placement: Placement) -> Callable[[], Tensor]:
    """What waits for the loads [R, E_local] that each rank of the block sends this one."""
    ones = [1] * placement.block.size
    return all_to_all(loads, ones, ones, placement.block)


def alone(
    x: Tensor, ids: Tensor, weights: Tensor, compute: Compute, meanwhile: Meanwhile
) -> tuple[Tensor, Tensor | None]:
    """All experts are here."""
    beside = meanwhile()
    return compute(x, ids, weights), beside


def arange(count: int, like: Tensor) -> Tensor:
    """0 to count - 1, int64."""
    return torch.arange(count, device=like.device)
