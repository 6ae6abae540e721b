"""A thread beside the main thread of every rank: it tells where this rank is, listens to the others, and ends what hangs."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from nemohybrid.train.watch.activity import Activity
from nemohybrid.train.watch.board import Board
from nemohybrid.train.watch.diagnosis import Facts, alone, report
from nemohybrid.train.watch.judge import Limits, alarm
from nemohybrid.train.watch.processes import GONE, kill, leave_nothing, space_of_ids, started_at, state_of
from nemohybrid.train.watch.record import Beat, Entered, LastWords
from nemohybrid.train.watch.sight import Glances, Sight, Stack, Stacks, look
from nemohybrid.train.watch.straggler import Stragglers

HUNG = 69
"""Exit status of a rank that the watch has ended (EX_UNAVAILABLE of sysexits.h)."""
GLANCE_S = 0.5
"""Between two looks at the stacks of this process, of half a millisecond each."""
POLL_S = 0.05
LONGEST_BEAT_S = 5.0
BEATS_IN_A_LIMIT = 10
REPORT = "hang.txt"
_ALARM, _BEAT, _WORDS, _REPORTER, _REPORT = "alarm", "beat", "words", "reporter", "report"
_COLLECT_BEATS = 3
_COLLECT_S = 2.0
REPORT_WAIT_S = 60.0
_REST_S = 1.0
"""After the report: time for the others to read who is to be killed, before the store may go with its host."""


class Watchdog(threading.Thread):
    """groups: name -> handle and ranks of the process groups of this rank; peers: as `Stragglers` has them; folder: where
    the report goes; locals: the ranks of this host.

    Only `lost_peers` and `close` are for other threads.
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
        locals: Sequence[int],
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.board, self.rank, self.activity, self.limits = board, rank, activity, limits
        self.folder, self.groups, self.locals = folder, groups, locals
        self.size = sum(map(len, peers))
        self.main, self.stacks = threading.main_thread().ident or 0, Stacks()
        self.beat_s = min(LONGEST_BEAT_S, limits.hang / BEATS_IN_A_LIMIT)
        self.own = Beat(rank, socket.gethostname(), os.getpid(), started_at(), space_of_ids())
        self.stragglers = Stragglers(peers)
        self.glances = Glances()
        self.closing, self.wanted, self.reported = threading.Event(), threading.Event(), threading.Event()
        self.why = ""
        self.raised_at: Sight | None = None
        self.is_ending = False
        self.is_leaving = False  # the main thread has an error of its own, and ends the process with it
        self.position, self.moved = ((0, 0, 0), Stack()), time.monotonic()
        self.heard: dict[int, tuple[Beat, float]] = {}  # rank -> its last beat, and when that came
        self.board.write(f"{_BEAT}/{rank}", self.own.text())

    def run(self) -> None:
        """Until `close`, or the end of the process."""
        with closing(self.stacks):
            self._watch()

    def _watch(self) -> None:
        due = glanced = time.monotonic()
        while not self.closing.wait(min(GLANCE_S, self.beat_s)):
            now = time.monotonic()
            self._glance(now - glanced)
            glanced = now
            if self.wanted.is_set() or now >= due:
                due = now + self.beat_s
                if why := self._look_around(now):
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
        self.closing.set()
        self.join(timeout=LONGEST_BEAT_S)
        with suppress(RuntimeError):  # of a store that has gone with its host
            self.board.write(f"{_BEAT}/{self.rank}", replace(self.own, left=left, count=-1).text())

    def _glance(self, elapsed: float) -> None:
        """Whether the main thread waits, many times a second; the share of it is what it has waited."""
        activity = self.activity
        if activity.is_patient:
            return
        waits = self.glances.is_waiting(self._stack())
        own, busy = self.own, 0.0 if waits else elapsed
        self.own = replace(own, looked=own.looked + elapsed, busy=own.busy + busy, steps=activity.steps)

    def _stack(self) -> Stack:
        return self.stacks.of(self.main)

    def _look_around(self, now: float) -> str:
        """Tell where this rank is, and listen. Returns why the job must end, if it must."""
        still = self._still(now)
        try:
            self._tell(still)
            return self.why or self.board.read(_ALARM) or self._judge(now)
        except RuntimeError as error:  # of the store
            unheard = (
                f"rank {self.rank} cannot reach the store of the job, which lives where the job was started: {error}"
            )
            patience = self.limits.patience if self.activity.is_patient else self.limits.hang
            return self.why or (unheard if still > patience else "")

    def _still(self, now: float) -> float:
        """Seconds since the main thread moved: went on to another phase or microbatch, or stands elsewhere."""
        position = self.activity.position, self._stack()
        if position != self.position:
            self.position, self.moved = position, now
        return now - self.moved

    def _tell(self, still: float) -> None:
        activity, own = self.activity, self.own
        told = {"step": activity.step, "phase": activity.phase, "patient": activity.is_patient, "still": still}
        self.own = replace(own, count=own.count + 1, **told)
        self.board.write(f"{_BEAT}/{self.rank}", self.own.text())

    def _judge(self, now: float) -> str:
        """The first and the last rank, mostly on two hosts, judge all; the others judge the first, and everybody knows when
        the process of its neighbour is gone.
        """
        is_judge = self.rank in (0, self.size - 1)
        beats = self._listen(range(self.size) if is_judge else (0,), now)
        silent = {rank: now - self.heard[rank][1] for rank in beats}
        if self.rank == 0:
            self._compare(beats, now)
        patient = Limits(self.limits.patience, self.limits.patience)
        return self._gone_neighbour(now) or alarm(beats, silent, self.limits if is_judge else patient)

    def _listen(self, ranks: Sequence[int], now: float) -> dict[int, Beat]:
        beats = {rank: Beat.read(text) for rank, text in self.board.of_ranks(_BEAT, ranks).items()}
        for rank, beat in beats.items():
            if rank not in self.heard or self.heard[rank][0].count != beat.count:
                self.heard[rank] = beat, now
        return beats

    def _gone_neighbour(self, now: float) -> str:
        at = self.locals.index(self.rank)
        neighbour = self.locals[(at + 1) % len(self.locals)]
        beat = self._listen((neighbour,), now).get(neighbour) if neighbour != self.rank else None
        if beat is None or beat.left or beat.pids != self.own.pids or state_of(beat.pid) != GONE:
            return ""
        beat = self._listen((neighbour,), now)[neighbour]  # it may just have said good-bye
        return "" if beat.left else f"the process {beat.pid} of rank {neighbour} on {beat.host} is gone"

    def _compare(self, beats: Mapping[int, Beat], now: float) -> None:
        slowest, lines = self.stragglers.update(beats, now)
        self.activity.slowest = slowest or self.activity.slowest
        self.activity.seen.extend(lines)

    def _end(self, why: str) -> None:
        """Last words, the report, and the end of this process within a bounded time, whatever the store does."""
        self.is_ending = True
        threading.Thread(target=self._end_for_sure, daemon=True).start()
        stuck: dict[int, Beat] = {}
        try:
            stuck = self._say_last_words(why)
        except RuntimeError as error:  # the store is gone: everybody tells what he knows
            self._publish(alone(f"{why} ({error})", self._last_words()))
        self.reported.set()
        for beat in stuck.values():
            if beat.pids == self.own.pids:
                kill(beat.pid, beat.started)
        time.sleep(_REST_S)
        if not self.is_leaving:
            leave_nothing(HUNG)

    def _end_for_sure(self) -> None:
        """Also an error that should end the main thread may be stuck on its way, in a destructor say."""
        time.sleep(self._collect_s() * 2 + 4 * LONGEST_BEAT_S)
        leave_nothing(HUNG)

    def _collect_s(self) -> float:
        return _COLLECT_BEATS * self.beat_s + _COLLECT_S

    def _say_last_words(self, why: str) -> dict[int, Beat]:
        """Returns the ranks that do not answer, as one rank says it to all."""
        words = self._last_words()
        self.board.write(f"{_WORDS}/{self.rank}", words.text())
        self.board.write(_ALARM, self.board.read(_ALARM) or why)
        collected = time.monotonic() + self._collect_s()
        self._wait_for(_WORDS, collected)
        if self.rank != 0:  # where rank 0 still lives, it speaks
            self._wait_for(_REPORT, collected + self.beat_s + _REST_S)
        if not self.board.read(_REPORT) and self.board.claim(_REPORTER):
            self._report()
        self._wait_for(_REPORT, collected + self._collect_s())
        silent = self.board.read(_REPORT).split()
        return self._listen([int(r) for r in silent if int(r) in self.locals], time.monotonic())

    def _wait_for(self, what: str, until: float) -> None:
        """Until all ranks have spoken, or the report is there, or the time has come."""
        while time.monotonic() < until and not self._is_there(what):
            time.sleep(POLL_S)

    def _is_there(self, what: str) -> bool:
        if what == _REPORT or self.rank != 0:  # in a large job not everybody counts everybody's words
            return bool(self.board.read(_REPORT))
        silent = set(range(self.size)) - self.board.of_ranks(_WORDS, range(self.size)).keys()
        return all(self._cannot_speak(beat) for beat in self._listen(sorted(silent), time.monotonic()).values())

    def _cannot_speak(self, beat: Beat) -> bool:
        return bool(beat.left) or (beat.pids == self.own.pids and state_of(beat.pid) == GONE)

    def _report(self) -> None:
        everyone = range(self.size)
        words = {rank: LastWords.read(text) for rank, text in self.board.of_ranks(_WORDS, everyone).items()}
        facts = Facts(self.board.read(_ALARM), self.size, self._listen(everyone, time.monotonic()), words)
        self._publish(report(facts))
        self.board.write(_REPORT, " ".join(str(r) for r in everyone if r not in words) or " ")

    def _publish(self, text: str) -> None:
        """On stderr, past what a main thread may hold, and below earlier ones in the run folder."""
        stamp = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
        with suppress(OSError), (self.folder / REPORT).open("a") as file:
            file.write(f"{stamp}: {text}\n\n")

    def _last_words(self) -> LastWords:
        activity, own = self.activity, self.own
        sight = self.raised_at or look(self._stack())
        _, stage, microbatch = activity.position
        still, groups = time.monotonic() - self.moved, self._entered()
        neighbours = {rank: state_of(beat.pid) for rank, beat in self._neighbours().items()}
        return LastWords(
            own.rank,
            own.host,
            own.pid,
            activity.step,
            activity.phase,
            stage,
            microbatch,
            still,
            sight.waits_in,
            sight.places,
            sight.innermost,
            groups,
            neighbours,
        )

    def _neighbours(self) -> dict[int, Beat]:
        try:
            beats = self._listen([rank for rank in self.locals if rank != self.rank], time.monotonic())
        except RuntimeError:
            return {}
        return {rank: beat for rank, beat in beats.items() if beat.pids == self.own.pids}

    def _entered(self) -> dict[str, Entered]:
        found = {}
        for name, (handle, members) in self.groups.items():
            with suppress(RuntimeError):  # a backend that does not count
                found[name] = Entered(members, handle._get_sequence_number_for_group())  # pyright: ignore
        return found
