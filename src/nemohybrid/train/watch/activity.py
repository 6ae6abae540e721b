"""What the main thread of a rank is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemohybrid.precision.clock import Clock
    from nemohybrid.train.watch.straggler import Slowest

STARTING, CALLBACKS, EVALUATING, SAVING, LEAVING = "starting", "callbacks", "evaluating", "saving", "leaving"
ORDERING = "making or awaiting the order of an epoch"
DATA, PASSES, NORM, AGREEMENT, UPDATE = "reading data", "forward and backward", "gradient norm", "agreement", "update"
PATIENT = frozenset({STARTING, CALLBACKS, EVALUATING, SAVING, LEAVING, ORDERING})
"""What may take long, or is done by one rank while the others wait for it."""
WARM_UP = 2
"""First steps of a process, in which kernels may be compiled."""


class Activity:
    """The main thread writes, the watch reads, and the other way round for what it has `seen`. Single attributes: no lock.

    steps: begun by this process; clock: of the model, once there is one; slowest: of the last window in which steps were
    compared, on rank 0; seen: lines about it that nobody has printed yet.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.steps, self.moves = STARTING, 0, 0, 0
        self.clock: Clock | None = None
        self.slowest: Slowest | None = None
        self.seen: deque[str] = deque()

    def enter(self, phase: str) -> None:
        """From now on the main thread is in `phase`."""
        self.phase = phase
        self.move()

    def move(self) -> None:
        """The main thread gets on, within a phase that has no counter of its own."""
        self.moves += 1

    def begin_step(self, step: int) -> None:
        """The first phase of a step is to read its data."""
        self.step = step
        self.steps += 1
        self.enter(DATA)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` while the block runs, then what was before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def is_patient(self) -> bool:
        """Whether what the rank does may take as long as a collective may."""
        return self.phase in PATIENT or self.steps <= WARM_UP

    @property
    def position(self) -> tuple[int, int, int]:
        """Changes whenever the main thread gets on. Third the microbatch, which a pass sets without telling us."""
        clock = self.clock
        return self.moves, (0 if clock is None else clock.stage), (0 if clock is None else clock.microbatch)
