"""Which rank computes longer than its peers. Pure: from counts of the ranks to words."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemohybrid.train.watch.record import Beat

SLOW = 1.3
"""A rank that computes this many times as long as the median of its peers is named,"""
FAST_AGAIN = 1.15
"""and one that was named is, once it needs no more than this."""
WINDOWS = 3
"""In so many windows one after the other: one alone may be noise."""
HOLDS_UP = 0.5
"""A rank that itself waits for more than this share of its steps is not the one that others wait for."""
WINDOW_S = 60.0
"""Seconds of a window, at least: of a hundred glances at a main thread, two a second, the share of those in which it waits is
known within 5 per cent, so that three windows one after the other are no chance, in a job of thousands of ranks either.
"""
FEWEST_STEPS = 2
LARGEST = 100.0
"""What is said of a rank whose peers were never seen to compute."""


@dataclass(frozen=True)
class Slowest:
    """The rank of a window that computed longest in terms of its peers' median."""

    rank: int
    ratio: float


@dataclass
class Stragglers:
    """peers: all ranks, those together that do the same work. Windows follow each other without a gap."""

    peers: Sequence[Sequence[int]]
    begin: dict[int, Beat] = field(default_factory=dict)
    began: float = 0.0
    high: dict[int, list[int]] = field(default_factory=dict)  # rank -> steps of its slow windows in a row
    low: dict[int, int] = field(default_factory=dict)  # rank that was named -> fast windows in a row

    def update(self, beats: Mapping[int, Beat], now: float) -> tuple[Slowest | None, list[str]]:
        """The slowest rank of the window that ends here, and what is to be said; None in the middle of a window."""
        steps = [beat.steps - self.begin[r].steps for r, beat in beats.items() if r in self.begin]
        if len(steps) < sum(map(len, self.peers)):
            self.begin, self.began = dict(beats), now
            return None, []
        if now - self.began < WINDOW_S or min(steps) < FEWEST_STEPS:
            return None, []
        found = ratios(busy_per_step(self.begin, beats), self.peers)
        lines = [line for rank, ratio in sorted(found.items()) for line in self._judge(beats[rank], ratio)]
        self.begin, self.began = dict(beats), now
        rank = max(found, key=lambda r: found[r], default=None)
        return (None if rank is None else Slowest(rank, found[rank])), lines

    def _judge(self, beat: Beat, ratio: float) -> list[str]:
        rank, steps = beat.rank, beat.steps - self.begin[beat.rank].steps
        if rank in self.low:
            self.low[rank] = self.low[rank] + 1 if ratio <= FAST_AGAIN else 0
            if self.low[rank] < WINDOWS:
                return []
            del self.low[rank]
            return [f"rank {rank} on {beat.host} keeps up again"]
        is_slow = ratio >= SLOW and busy_share(self.begin[rank], beat) >= HOLDS_UP
        run = self.high[rank] = [*self.high.get(rank, []), steps] if is_slow else []
        if len(run) < WINDOWS:
            return []
        self.low[rank], self.high[rank] = 0, []
        return [
            f"rank {rank} on {beat.host} is {ratio:.1f}x slower than the median of its peers, for {sum(run)} steps by now"
        ]


def busy_share(begin: Beat, end: Beat) -> float:
    """Of the time of its steps in which a rank was looked at, the share in which it waited for nobody."""
    looked = end.looked - begin.looked
    return (end.busy - begin.busy) / looked if looked > 0 else 0.0


def busy_per_step(begin: Mapping[int, Beat], end: Mapping[int, Beat]) -> dict[int, float]:
    """Rank -> seconds of a step in which it waited for nobody."""
    return {r: (beat.busy - begin[r].busy) / (beat.steps - begin[r].steps) for r, beat in end.items()}


def ratios(busy: Mapping[int, float], peers: Sequence[Sequence[int]]) -> dict[int, float]:
    """Rank -> its time over the median of the others that do the same work, up to `LARGEST`; not of ranks without peers."""
    found = {}
    for group in peers:
        ordered = sorted(busy[rank] for rank in group)
        for rank in group if len(group) > 1 else ():
            own, middle = busy[rank], _median_without(ordered, busy[rank])
            found[rank] = own / max(middle, own / LARGEST) if own > 0 else 0.0
    return found


def _median_without(ordered: Sequence[float], own: float) -> float:
    """The median of what is left of `ordered` when `own` is taken out once."""
    gap, left = bisect_left(ordered, own), len(ordered) - 1
    low, high = (ordered[k + (k >= gap)] for k in ((left - 1) // 2, left // 2))
    return (low + high) / 2
