"""A thread beside the main thread of every rank: it tells where this rank is, listens to the others, and ends what hangs."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from nemohybrid.errors import HUNG
from nemohybrid.train.watch.activity import Activity
from nemohybrid.train.watch.board import Board, holder
from nemohybrid.train.watch.ending import ALARM, REST_S, STOP, Ending, say
from nemohybrid.train.watch.hearing import BEAT, Hearing
from nemohybrid.train.watch.judge import Limits, alarm
from nemohybrid.train.watch.processes import kill, leave_nothing, space_of_ids, started_at
from nemohybrid.train.watch.record import Beat, Entered, LastWords
from nemohybrid.train.watch.sight import Glances, Sight, Stack, Stacks, look
from nemohybrid.train.watch.straggler import Stragglers
from nemohybrid.train.watch.wording import seconds

GLANCE_S = 0.5
"""Between two looks at the stacks of this process, of half a millisecond each."""
POLL_S = 0.05
LONGEST_BEAT_S = 5.0
BEATS_IN_A_LIMIT = 10
LONGEST_GAP_BEATS = 2
"""Between two glances. Where it was longer, the process was suspended, or waited for the store."""
REPORT_WAIT_S = 60.0


class Watchdog(threading.Thread):
    """groups: name -> handle and ranks of the process groups of this rank; peers: as `Stragglers` has them; folder: where
    the report goes; here: the ranks of this host.

    Watches the thread that makes it. Only `lost_peers` and `close` are for other threads.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        activity: Activity,
        limits: Limits,
        folder: Path,
        groups: Mapping[str, tuple[object, tuple[int, ...]]],
        peers: Sequence[Sequence[int]],
        here: Sequence[int],
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.board, self.rank, self.activity, self.limits, self.groups = board, rank, activity, limits, groups
        self.size = sum(map(len, peers))
        self.main, self.stacks = threading.get_ident(), Stacks()
        self.beat_s = min(LONGEST_BEAT_S, limits.hang / BEATS_IN_A_LIMIT)
        self.own = Beat(rank, socket.gethostname(), os.getpid(), started_at(), space_of_ids())
        self.hearing = Hearing(board, self.own, here)
        self.ending = Ending(board, self.hearing, self.size, self.beat_s, folder)
        self.is_judge = rank in (0, self.size - 1)
        self.stragglers = Stragglers(peers)
        self.glances = Glances()
        self.closing, self.wanted, self.reported = threading.Event(), threading.Event(), threading.Event()
        self.why = self.suspected = ""
        self.raised_at: Sight | None = None
        self.is_ending = self.is_deaf = False
        self.is_leaving = False  # the main thread has come to its end, and ends the process itself
        self.now = 0.0  # seconds for which this process has run: while a job is suspended, nobody hangs
        self.position, self.moved = ((0, 0, 0), Stack()), self.now
        self.answered = self.patient = self.now
        self.board.write(f"{BEAT}/{rank}", self.own.text())

    def run(self) -> None:
        """Until `close`, or the end of the process."""
        with closing(self.stacks):
            self._watch()

    def _watch(self) -> None:
        glanced, due = time.monotonic(), self.now
        while not self.closing.wait(min(GLANCE_S, self.beat_s)):
            before, glanced = glanced, time.monotonic()
            elapsed = min(glanced - before, LONGEST_GAP_BEATS * self.beat_s)
            self.now += elapsed
            self._glance(elapsed)
            if self.wanted.is_set() or self.now >= due:
                due = self.now + self.beat_s
                if why := self._look_around():
                    self._end(why)
                    return

    def lost_peers(self, why: str, raised_at: Sight | None) -> None:
        """Called by a main thread that has lost its peers there; returns when it is known why, and told.

        It then has an error of its own to end with, unless the watch was about to end the process: then it never returns.
        """
        if not self.is_ending:
            self.why, self.raised_at, self.is_leaving = why, raised_at, True
            self.wanted.set()
        self.reported.wait(REPORT_WAIT_S)
        if not self.is_leaving:
            self.join(REPORT_WAIT_S)

    def close(self, left: str) -> None:
        """The rank ends, with an error or `DONE`. Nobody watches it any more."""
        self.is_leaving = True
        self.closing.set()
        self.join(timeout=LONGEST_BEAT_S)
        last = replace(self.own, left=left, count=-1)
        with suppress(RuntimeError):  # of a store that has gone with its host
            if last.was_stopped:
                self.board.write(STOP, left)
            self.board.write(f"{BEAT}/{self.rank}", last.text())
            if self.rank == holder() and not self.is_ending:
                self._stay()

    def _stay(self) -> None:
        """The store goes with this process. So that the others can read why, or say that they are done."""
        until = time.monotonic() + self.beat_s + REST_S
        everyone = set(range(self.size)) - {self.rank}
        while time.monotonic() < until and not all(
            beat.left for beat in self.hearing.listen(everyone, self.now).values()
        ):
            time.sleep(POLL_S)

    def _glance(self, elapsed: float) -> None:
        """Whether the main thread has moved, and whether it waits, many times a second; the share of it is what it has waited."""
        activity, stack = self.activity, self.stacks.of(self.main)
        if (position := (activity.position, stack)) != self.position:
            self.position, self.moved = position, self.now
        if activity.is_patient:
            return
        waits = self.glances.is_waiting(stack)
        own, busy = self.own, 0.0 if waits else elapsed
        self.own = replace(own, looked=own.looked + elapsed, busy=own.busy + busy, steps=activity.steps)

    def _look_around(self) -> str:
        """Tell where this rank is, and listen. Returns why the job must end, if it must.

        The first and the last rank, mostly on two hosts, listen to all; the others to the first and to those of their host.
        """
        try:
            self._tell()
            beats = self.hearing.listen(range(self.size) if self.is_judge else {0, *self.hearing.here}, self.now)
            self.answered = self.now
            return self.why or self.board.read(ALARM) or self._gone() or self._judge(beats)
        except RuntimeError:  # of the store
            return self.why or self._gone() or self._without_the_store()

    def _tell(self) -> None:
        activity, own = self.activity, self.own
        still = self.now - self.moved
        told = {"step": activity.step, "phase": activity.phase, "patient": activity.is_patient, "still": still}
        self.own = replace(own, count=own.count + 1, **told)
        self.board.write(f"{BEAT}/{self.rank}", self.own.text())

    def _gone(self) -> str:
        """Everybody knows when the process of a neighbour is gone."""
        if not self.hearing.gone():
            return ""
        with suppress(RuntimeError):  # it may just have said good-bye
            self.hearing.listen(self.hearing.gone(), self.now)
        gone = self.hearing.gone().items()
        return next((f"the process {beat.pid} of rank {rank} on {beat.host} is gone" for rank, beat in gone), "")

    def _judge(self, beats: Mapping[int, Beat]) -> str:
        """Two looks must find the same: the first may go by beats that are old."""
        if self.rank == 0:
            self._compare(beats)
        if any(beat.patient and not beat.left for beat in beats.values()):
            self.patient = self.now
        silent = {rank: self.now - self.hearing.heard[rank][1] for rank in beats}
        limits = self.limits if self.is_judge else Limits(self.limits.patience, self.limits.patience)
        before, self.suspected = self.suspected, alarm(beats, silent, limits, self.now - self.patient)
        return self.suspected if before else ""

    def _without_the_store(self) -> str:
        """Nobody hears of the others. A rank that moves goes on."""
        deaf, still = self.now - self.answered, self.now - self.moved
        if deaf > LONGEST_GAP_BEATS * self.beat_s and not self.is_deaf and self.hearing.speaks:
            self.is_deaf = True
            say(
                f"rank {self.rank} on {self.own.host}: the store of the job does not answer; the watch sees this host alone"
            )
        if min(deaf, still) <= (self.limits.patience if self.activity.is_patient else self.limits.hang):
            return ""
        return f"rank {self.rank} has not moved for {seconds(still)}, and hears of no other"

    def _compare(self, beats: Mapping[int, Beat]) -> None:
        slowest, lines = self.stragglers.update(beats, self.now)
        self.activity.slowest = slowest or self.activity.slowest
        self.activity.seen.extend(lines)

    def _end(self, why: str) -> None:
        """The report, and the end of this process within a bounded time, whatever the store does."""
        self.is_ending = True
        self.ending.make_sure()
        stuck = self.ending.tell(why, self._last_words())
        self.reported.set()
        time.sleep(REST_S)
        for beat in stuck:
            kill(beat.pid, beat.started)
        if not self.is_leaving:
            leave_nothing(HUNG)

    def _last_words(self) -> LastWords:
        activity, own = self.activity, self.own
        sight = self.raised_at or look(self.stacks.of(self.main))
        _, stage, microbatch = activity.position
        return LastWords(
            own.rank,
            own.host,
            own.pid,
            activity.step,
            activity.phase,
            stage,
            microbatch,
            self.now - self.moved,
            sight.waits_in,
            sight.places,
            sight.innermost,
            self._entered(),
            self.hearing.states(),
        )

    def _entered(self) -> dict[str, Entered]:
        found = {}
        for name, (handle, members) in self.groups.items():
            with suppress(RuntimeError):  # a backend that does not count
                found[name] = Entered(members, handle._get_sequence_number_for_group())  # pyright: ignore
        return found
