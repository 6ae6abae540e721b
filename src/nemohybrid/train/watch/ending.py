"""How a job that hangs ends: all tell where they stand, one of them reports, and what cannot end itself is killed."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

from nemohybrid.errors import HUNG, Stopped
from nemohybrid.train.watch.board import Board, holder
from nemohybrid.train.watch.diagnosis import Facts, alone, report
from nemohybrid.train.watch.hearing import Hearing
from nemohybrid.train.watch.processes import GONE, RUNS, STOPPED, leave_nothing
from nemohybrid.train.watch.record import DONE, Beat, LastWords

REPORT = "hang.txt"
ALARM, STOP = "alarm", "stop"
_WORDS, _REPORTER, _REPORT = "words", "reporter", "report"
_POLLS_A_BEAT = 10
_COLLECT_BEATS = 3
_COLLECT_S = 2.0
_SPARE_S = 20.0
"""For answers of a store that is slow, and between two last resorts."""
REST_S = 1.0
"""After the report: time for the others to read who is to be killed, before the store may go with its host."""


class Ending:
    """size: of the world; beat_s: seconds between two beats of a rank; folder: where the report goes."""

    def __init__(self, board: Board, hearing: Hearing, size: int, beat_s: float, folder: Path) -> None:
        self.board, self.hearing, self.size, self.beat_s, self.folder = board, hearing, size, beat_s, folder
        self.collect_s = _COLLECT_BEATS * beat_s + _COLLECT_S

    def make_sure(self) -> None:
        """That this process ends within a bounded time: also an error that should end the main thread may be stuck on its way, in
        a destructor say. Twice, since the first needs an interpreter that gives a thread its turn.
        """
        bound = 2 * self.collect_s + _SPARE_S

        def end() -> None:
            time.sleep(bound)
            leave_nothing(HUNG)

        threading.Thread(target=end, name="end", daemon=True).start()
        faulthandler.dump_traceback_later(bound + _SPARE_S, exit=True, file=2)

    def tell(self, why: str, words: LastWords) -> list[Beat]:
        """Make all tell where they stand, and one of them report. Returns those of this host that cannot end themselves."""
        try:
            return [] if self._is_stopped(self.board.read(STOP)) else self._with_all(why, words)
        except RuntimeError as error:  # the store is gone: everybody tells what he knows
            heard = next((beat.left for beat in self.hearing.beats.values() if beat.was_stopped), "")
            return [] if self._is_stopped(heard) else self._alone(f"{why} ({str(error).splitlines()[0]})", words)

    def _is_stopped(self, told: str) -> bool:
        """Where somebody has stopped a rank, the others have nobody to blame."""
        if told and self.hearing.speaks:
            say(f"this job ends, for a rank of it was {told.removeprefix(f'{Stopped.__name__}: ')}")
        return bool(told)

    def _with_all(self, why: str, words: LastWords) -> list[Beat]:
        """Who does not answer is found by one rank for all."""
        self.board.write(f"{_WORDS}/{words.rank}", words.text())
        self.board.write(ALARM, self.board.read(ALARM) or why)
        collected = time.monotonic() + self.collect_s
        self._wait_for(self._are_all_heard if words.rank == 0 else self._is_reported, collected)
        if words.rank != 0:  # where rank 0 still lives, it speaks
            self._wait_for(self._is_reported, collected + self.beat_s + REST_S)
        if not self._is_reported() and self.board.claim(_REPORTER):
            self._report()
        self._wait_for(self._is_reported, collected + self.collect_s)
        silent = [int(rank) for rank in self.board.read(_REPORT).split()]
        return [beat for rank, beat in self.hearing.neighbours.items() if rank in silent]

    def _wait_for(self, come: Callable[[], bool], until: float) -> None:
        while time.monotonic() < until and not come():
            time.sleep(self.beat_s / _POLLS_A_BEAT)

    def _is_reported(self) -> bool:
        return bool(self.board.read(_REPORT))

    def _are_all_heard(self) -> bool:
        """Rank 0 alone asks: in a large job not everybody counts everybody's words."""
        silent = self.board.silent(_WORDS, range(self.size))
        beats, states = self.hearing.listen(silent, time.monotonic()), self.hearing.states()
        return self._is_reported() or all(beat.left or states.get(rank) == GONE for rank, beat in beats.items())

    def _report(self) -> None:
        everyone = range(self.size)
        words = {rank: LastWords.read(text) for rank, text in self.board.of_ranks(_WORDS, everyone).items()}
        beats = self.hearing.listen(everyone, time.monotonic())
        self._publish(report(Facts(self.board.read(ALARM), self.size, beats, words)))
        silent = [rank for rank in everyone if rank not in words and not (rank in beats and beats[rank].left == DONE)]
        self.board.write(_REPORT, " ".join(map(str, silent)) or " ")

    def _alone(self, why: str, words: LastWords) -> list[Beat]:
        """One rank reports here too, mostly: the first of the host of who had the store, which can look at its process."""
        hearing, of_store = self.hearing, holder()
        if of_store is not None and of_store in hearing.here:  # who dies is still there when its connections have gone
            self._wait_for(lambda: hearing.states().get(of_store) != RUNS, time.monotonic() + REST_S)
        states = hearing.states()
        time.sleep(REST_S * ((not hearing.speaks) + (of_store not in hearing.here)))
        facts = Facts(why, self.size, hearing.beats, {words.rank: replace(words, neighbours=states)})
        self._publish(alone(facts, of_store))
        return [beat for rank, beat in hearing.neighbours.items() if states[rank] == STOPPED]

    def _publish(self, text: str) -> None:
        """On stderr, and below earlier ones in the run folder; the first of a job alone."""
        stamp = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        job = f"job {self.board.name[:8]}"
        try:
            with (self.folder / REPORT).open("a+") as file:
                _lock(file)
                file.seek(0)
                if job in file.read():
                    return
                file.write(f"{stamp}, {job}: {text}\n\n")
        except BlockingIOError:  # another rank is at it
            return
        except OSError:  # a report is worth more than its file
            pass
        say(text)


def _lock(file: TextIO) -> None:
    """Raises BlockingIOError where another has the lock. A file system without locks may get two reports."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def say(text: str) -> None:
    """On stderr, past what a main thread may hold."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
