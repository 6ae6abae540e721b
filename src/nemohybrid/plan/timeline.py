"""When each pass of a pipeline begins and ends: `parallel.schedule`'s orders, simulated with the stages' times."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from nemohybrid.parallel.schedule import BACKWARD, FORWARD, Action, Orders
from nemohybrid.plan.cost import Time


class Span(NamedTuple):
    """One pass, and when it runs, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """For each rank its passes in order."""

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds until the last rank is done."""
        return max(span.end for rank in self.spans for span in rank)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds in which each rank computes."""
        return tuple(sum(span.end - span.start for span in rank) for rank in self.spans)

    @property
    def idle(self) -> tuple[float, ...]:
        """The share of the step in which each rank waits."""
        return tuple(_share(self.makespan - busy, self.makespan) for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        return sum(self.idle) / len(self.spans)

    @property
    def ideal(self) -> float:
        """Seconds, if the same work were shared equally and nobody waited."""
        return sum(self.busy) / len(self.spans)


def simulate(orders: Orders, times: Sequence[Time], transfer: float = 0.0) -> Timeline:
    """Run the orders of all ranks. times: of one microbatch in each stage; transfer: seconds from one rank to another.

    A pass starts when its rank is free and its input is there; transfers wait for nobody and delay no computation.
    Raises AssertionError for orders that wait for each other.
    """
    simulation = _Simulation(orders, times, transfer if len(orders) > 1 else 0.0)
    while simulation.advance():
        pass
    assert simulation.is_done(), "the orders wait for each other"
    return Timeline(tuple(map(tuple, simulation.spans)))


class _Simulation:
    def __init__(self, orders: Orders, times: Sequence[Time], transfer: float) -> None:
        self.orders, self.times, self.transfer = orders, times, transfer
        self.ends: dict[tuple[str, int, int], float] = {}  # plain tuples: a step has many
        self.spans: list[list[Span]] = [[] for _ in orders]

    def is_done(self) -> bool:
        return all(len(spans) == len(order) for spans, order in zip(self.spans, self.orders, strict=True))

    def advance(self) -> bool:
        """Run every rank until it has to wait for a pass that is not placed yet; whether any ran."""
        before = len(self.ends)
        for order, spans in zip(self.orders, self.spans, strict=True):
            free = spans[-1].end if spans else 0.0
            for action in order[len(spans) :]:
                ready = self.ready(*action)
                if ready is None:
                    break
                start, time = max(ready, free), self.times[action.stage]
                free = start + (time.forward if action.kind == FORWARD else time.backward)
                self.ends[action] = free
                spans.append(Span(action, start, free))
        return len(self.ends) > before

    def ready(self, kind: str, stage: int, microbatch: int) -> float | None:
        """When the inputs of a pass are there; None while that is not known. The rules of `schedule.inputs`."""
        if kind == FORWARD:
            return self.received((FORWARD, stage - 1, microbatch)) if stage else 0.0
        own = self.ends.get((FORWARD, stage, microbatch))
        if own is None or stage == len(self.times) - 1:
            return own
        return self.received((BACKWARD, stage + 1, microbatch))

    def received(self, computed: tuple[str, int, int]) -> float | None:
        end = self.ends.get(computed)
        return None if end is None else end + self.transfer


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
