"""The loss by position: does a model make use of what stands far back?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import ParallelContext


@dataclass(frozen=True)
class PositionScore:
    """The mean loss of the tokens that have `first` to `last` tokens of their document before them, in nats, and the mean over
    all that have `last` or fewer. NaN where there are none."""

    first: int
    last: int
    loss: float
    cumulative: float


class PositionLosses:
    """Sums and counts of losses in runs of positions that double: 0, 1, 2 to 3, 4 to 7, ... up to longest - 1.

    So the last run is the second half of a row of 2^n tokens, and as well known as the others.
    """

    def __init__(self, longest: int, device: torch.device) -> None:
        runs = (longest - 1).bit_length() + 1
        self.ends = torch.tensor([min(2**run, longest) - 1 for run in range(runs)], device=device)
        self.sums = torch.zeros(2, runs, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, mask: Tensor, positions: Tensor) -> None:
        """losses, mask and positions in their documents, [n, L] each. What fills a row up may lie beyond; it has no mask."""
        run = torch.bucketize(positions.flatten(), self.ends).clamp(max=len(self.ends) - 1)
        kept = torch.stack([losses * mask, mask]).flatten(1).to(self.sums.dtype)
        self.sums += torch.zeros_like(self.sums).index_add_(1, run, kept)

    def scores(self, context: ParallelContext) -> list[PositionScore]:
        """Over all ranks. Collective."""
        sums = sum_over(sum_over(self.sums.clone(), context.data), context.pipeline)
        loss, whole = sums[0] / sums[1], sums.cumsum(1)
        ends, firsts = self.ends.tolist(), [0, *(self.ends[:-1] + 1).tolist()]
        return [
            PositionScore(*score)
            for score in zip(firsts, ends, loss.tolist(), (whole[0] / whole[1]).tolist(), strict=True)
        ]
