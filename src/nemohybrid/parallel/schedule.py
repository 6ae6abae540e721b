"""Pipeline schedules: in which order each rank runs the forward and backward passes of its stages, and when it sends.

Stage s of a pipeline lives on rank s % ranks; with several stages a rank, a microbatch loops over the ranks. An order
is a tuple of `Action`s. Every schedule runs the backward passes of a stage in the order of the microbatches, so that
gradients are summed in the same order everywhere. Plain Python: what is planned here is what is simulated and run.
"""

from functools import cache
from typing import NamedTuple

from nemohybrid.errors import ConfigError

FORWARD, BACKWARD = "forward", "backward"
SEND, RECEIVE = "send", "receive"
SEND_GRADIENT, RECEIVE_GRADIENT = "send_gradient", "receive_gradient"
SCHEDULES = ("gpipe", "1f1b", "interleaved")

_TICKS = {FORWARD: 1, BACKWARD: 2}  # how long an action takes while `with_transfers` decides what happens first


class Action(NamedTuple):
    """One thing a rank does. The stage of a transfer is the one that consumes what is sent, on both sides."""

    kind: str
    stage: int
    microbatch: int


Orders = tuple[tuple[Action, ...], ...]
"""For each rank what it does, in order."""


@cache
def orders(schedule: str, ranks: int, stages: int, microbatches: int) -> Orders:
    """What each rank computes in one step, in order; no transfers yet (`with_transfers` adds them).

    gpipe: all forward passes, then all backward passes (arXiv 1811.06965); several stages a rank run one after the
    other, breadth first (arXiv 2211.05953). 1f1b: one stage a rank, at most ranks - rank microbatches in flight
    (arXiv 2104.04473, section 2.2.1). interleaved: depth first over the stages of a rank (the same, section 2.2.2).
    Raises ConfigError for an unknown schedule, stages that do not divide over the ranks, and a number of microbatches
    that the schedule cannot run, naming the nearest it can.
    """
    _check(schedule, ranks, stages, microbatches)
    make = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward, "interleaved": _interleaved}[schedule]
    return tuple(make(rank, ranks, stages, microbatches) for rank in range(ranks))


@cache
def forward_orders(ranks: int, stages: int, microbatches: int) -> Orders:
    """What each rank computes in an evaluation: forward passes only, in rounds of as many microbatches as ranks."""
    _check("gpipe", ranks, stages, microbatches)
    return tuple(
        tuple(
            Action(FORWARD, stage, microbatch)
            for first in range(0, microbatches, ranks)
            for stage in range(rank, stages, ranks)
            for microbatch in range(first, min(first + ranks, microbatches))
        )
        for rank in range(ranks)
    )


@cache
def with_transfers(computations: Orders) -> Orders:
    """The same orders with every transfer between ranks, each in the lists of both its ranks.

    Found by simulation: a rank starts its next computation as soon as the input is there, and a transfer enters both
    lists when its data has been computed. So one order of all transfers fits every list, two ranks meet their common
    transfers in the same order, and no list can wait for another in a circle, however a backend blocks. Raises
    AssertionError for orders that can never finish.
    """
    return _Transfers(computations).run()


def in_flight(schedule: str, rank: int, ranks: int, stages: int, microbatches: int) -> int:
    """The most passes (stage, microbatch) of a rank that are forward but not yet backward at one time, closed form."""
    local = stages // ranks
    if schedule == "gpipe":
        return local * microbatches
    if schedule == "1f1b":
        return min(microbatches, ranks - rank)
    return min(local * microbatches, _warmup(rank, ranks, local, microbatches) + 1)


def legal_microbatches(ranks: int, microbatches: int) -> bool:
    """Whether the interleaved schedule can run so many microbatches: whole rounds of equal size, at least `ranks`."""
    return microbatches % max(1, microbatches // ranks) == 0


def _check(schedule: str, ranks: int, stages: int, microbatches: int) -> None:
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown pipeline schedule {schedule!r}. Legal: {', '.join(SCHEDULES)}")
    if ranks < 1 or microbatches < 1:
        raise ConfigError(f"a pipeline of {ranks} ranks and {microbatches} microbatches: both must be at least 1")
    if stages < 1 or stages % ranks:
        raise ConfigError(f"{stages} stages cannot be shared by {ranks} pipeline ranks: not a positive multiple")
    if schedule == "1f1b" and stages != ranks:
        raise ConfigError(f"schedule 1f1b runs one stage a rank, not {stages // ranks}: use interleaved or gpipe")
    if schedule == "interleaved" and not legal_microbatches(ranks, microbatches):
        below = next(n for n in range(microbatches, 0, -1) if legal_microbatches(ranks, n))
        above = next(n for n in range(microbatches, 2 * microbatches) if legal_microbatches(ranks, n))
        rounds = microbatches // ranks
        raise ConfigError(
            f"schedule interleaved cannot run {microbatches} microbatches on {ranks} pipeline ranks: "
            f"{rounds} rounds of equal size do not hold them. Nearest legal: {below}, {above}"
        )


def _gpipe(rank: int, ranks: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    local = range(rank, stages, ranks)
    forward = [Action(FORWARD, stage, microbatch) for stage in local for microbatch in range(microbatches)]
    backward = [Action(BACKWARD, stage, microbatch) for stage in reversed(local) for microbatch in range(microbatches)]
    return (*forward, *backward)


def _one_forward_one_backward(rank: int, ranks: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    warmup = min(microbatches, stages - rank) - 1
    forward = [Action(FORWARD, rank, microbatch) for microbatch in range(microbatches)]
    backward = [Action(BACKWARD, rank, microbatch) for microbatch in range(microbatches)]
    return _alternate(forward, backward, warmup)


def _interleaved(rank: int, ranks: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """Rounds of microbatches: in each, every stage of the rank runs the whole round before the next stage does."""
    local = range(rank, stages, ranks)
    size = _round_size(ranks, microbatches)
    rounds = [range(first, first + size) for first in range(0, microbatches, size)]
    forward = [Action(FORWARD, stage, m) for whole in rounds for stage in local for m in whole]
    backward = [Action(BACKWARD, stage, m) for whole in rounds for stage in reversed(local) for m in whole]
    return _alternate(forward, backward, _warmup(rank, ranks, len(local), microbatches))


def _round_size(ranks: int, microbatches: int) -> int:
    return microbatches // max(1, microbatches // ranks)


def _warmup(rank: int, ranks: int, local: int, microbatches: int) -> int:
    """Forward passes before the first pair: one round of all stages but the last, and the way there and back."""
    return min(local * microbatches, (local - 1) * _round_size(ranks, microbatches) + 2 * (ranks - 1 - rank))


def _alternate(forward: list[Action], backward: list[Action], warmup: int) -> tuple[Action, ...]:
    """`warmup` forward passes, then forward and backward in turns, then the backward passes that are left."""
    pairs = zip(forward[warmup:], backward, strict=False)
    steady = [action for pair in pairs for action in pair]
    return (*forward[:warmup], *steady, *backward[len(forward) - warmup :])


class _Transfers:
    """The simulation behind `with_transfers`: a clock, and for each rank what it still computes and has listed."""

    def __init__(self, computations: Orders) -> None:
        self.computations, self.ranks = computations, len(computations)
        self.last_stage = max(action.stage for order in computations for action in order)
        self.next = [0] * self.ranks
        self.ends: list[int | None] = [None] * self.ranks  # when the running computation of a rank is done
        self.done: set[Action] = set()
        self.lists: list[list[Action]] = [[] for _ in range(self.ranks)]

    def run(self) -> Orders:
        now = 0
        while any(position < len(order) for position, order in zip(self.next, self.computations, strict=True)):
            for rank in range(self.ranks):
                self.finish(rank, now)
            for rank in range(self.ranks):
                self.start(rank, now)
            assert any(end is not None for end in self.ends) or self.finished(), "the orders wait for each other"
            now += 1
        return tuple(map(tuple, self.lists))

    def finished(self) -> bool:
        return all(position == len(order) for position, order in zip(self.next, self.computations, strict=True))

    def start(self, rank: int, now: int) -> None:
        if self.ends[rank] is not None or self.next[rank] == len(self.computations[rank]):
            return
        action = self.computations[rank][self.next[rank]]
        if all(needed in self.done for needed in inputs(action, self.last_stage)):
            self.lists[rank].append(action)
            self.ends[rank] = now + _TICKS[action.kind]

    def finish(self, rank: int, now: int) -> None:
        if self.ends[rank] != now:
            return
        action = self.computations[rank][self.next[rank]]
        self.done.add(action)
        self.ends[rank] = None
        self.next[rank] += 1
        self.transfer(action)

    def transfer(self, action: Action) -> None:
        """List what `action` computed as sent and received, unless the next stage lives on the same rank."""
        forward = action.kind == FORWARD
        consumer = action.stage + (1 if forward else -1)
        if self.ranks == 1 or not 0 <= consumer <= self.last_stage:
            return
        send, receive = (SEND, RECEIVE) if forward else (SEND_GRADIENT, RECEIVE_GRADIENT)
        self.lists[action.stage % self.ranks].append(Action(send, consumer, action.microbatch))
        self.lists[consumer % self.ranks].append(Action(receive, consumer, action.microbatch))


def inputs(action: Action, last_stage: int) -> tuple[Action, ...]:
    """The computations that must be done before this one can start: of the neighbouring stage, and its own."""
    kind, stage, microbatch = action
    if kind == FORWARD:
        return (Action(FORWARD, stage - 1, microbatch),) if stage else ()
    own = Action(FORWARD, stage, microbatch)
    return (own,) if stage == last_stage else (own, Action(BACKWARD, stage + 1, microbatch))
