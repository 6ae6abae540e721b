"""SIGTERM, SIGUSR1 and Ctrl-C: schedulers and people ask a run to stop, and nothing that was computed is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nemohybrid.errors import INTERRUPTED, REQUEUE, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM before a node is taken away, SIGUSR1 before the time limit (`sbatch --signal`), SIGINT from Ctrl-C."""


class StopSignals:
    """Listens while it is entered; only the main thread of a process can.

    A signal ends the program where it is, by `Stopped`, because at most times there is nothing to save. Inside of
    `deferred`, where there is, it only fills `received`; a Ctrl-C after that ends the program all the same.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for somebody to look at `received`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        impatient = bool(self.received) and number == signal.SIGINT
        self.received = self.received or number
        if impatient or not self._deferring:
            name, status = name_of(number), exit_status(number)
            raise Stopped(f"stopped by {name} at once; the same command goes on from the newest checkpoint", status)


def name_of(number: int) -> str:
    """`SIGTERM` for 15."""
    return signal.Signals(number).name


def exit_status(number: int) -> int:
    """0 where no signal stopped the run; 130 after Ctrl-C, as shells have it; for the others, "start me again"."""
    if not number:
        return 0
    return INTERRUPTED if number == signal.SIGINT else REQUEUE
