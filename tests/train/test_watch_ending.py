"""How one rank goes about a job that hangs, with a store in memory: what it hears, when it gives up, and how it ends."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from nemohybrid.errors import HUNG, Stopped
from nemohybrid.train.callbacks.stragglers import Stragglers
from nemohybrid.train.data import RunData
from nemohybrid.train.trainer import Trainer
from nemohybrid.train.watch import activity as doing
from nemohybrid.train.watch import board as boards
from nemohybrid.train.watch import ending, processes
from nemohybrid.train.watch.activity import Activity
from nemohybrid.train.watch.board import Board
from nemohybrid.train.watch.ending import Ending
from nemohybrid.train.watch.judge import Limits
from nemohybrid.train.watch.record import DONE, Beat
from nemohybrid.train.watch.watchdog import Watchdog

LIMITS = Limits(10.0, 100.0)


class Store:
    """Like a TCPStore in another process, which may be stopped: then every question waits."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        self.runs = threading.Event()
        self.runs.set()
        self.questions = 0

    def clone(self) -> "Store":
        return self

    def set_timeout(self, _: object) -> None:
        pass

    def set(self, key: str, text: str) -> None:
        self._answer()
        self.texts[key] = text.encode()

    def get(self, key: str) -> bytes:
        self._answer()
        return self.texts[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        return [self.texts[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.texts for key in keys)

    def add(self, key: str, count: int) -> int:
        self._answer()
        self.texts[key] = str(int(self.texts.get(key, b"0")) + count).encode()
        return int(self.texts[key])

    def _answer(self) -> None:
        self.questions += 1
        self.runs.wait()


@pytest.fixture
def store(monkeypatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(boards, "PATIENCE_S", 0.05)
    monkeypatch.setattr(ending, "REST_S", 0.02)
    monkeypatch.setattr("nemohybrid.train.watch.watchdog.REST_S", 0.02)
    monkeypatch.setattr(boards.uuid, "uuid4", lambda: SimpleNamespace(hex="0123456789"))
    yield store
    store.runs.set()


@pytest.fixture
def watchdog(store, tmp_path) -> Iterator[Callable[..., Watchdog]]:
    """`watchdog(1, here=[0, 1])`: of a rank of three that has entered its fifth step and stands still."""
    made = []

    def make(rank: int, here: list[int] | None = None, limits: Limits = LIMITS) -> Watchdog:
        activity = Activity()
        for step in range(1, 6):
            activity.begin_step(step)
        here = [0, 1, 2] if here is None else here
        made.append(Watchdog(Board(), rank, activity, limits, tmp_path, {}, [range(3)], here))
        return made[-1]

    yield make
    for one in made:
        one.stacks.close()


@pytest.fixture
def process() -> Iterator[psutil.Popen]:
    """Stands for a rank on the same host."""
    child = psutil.Popen(["sleep", "100"])
    yield child
    if child.poll() is None:
        child.kill()
    child.wait()


def beat(watchdog: Watchdog, rank: int, pid: int, **changes) -> None:
    """Of another rank in the same space of process ids."""
    told = Beat(rank, "vm", pid, processes.started_at(pid), watchdog.own.pids, step=5, phase="update", patient=False)
    watchdog.board.write(f"beat/{rank}", type(told)(**(vars(told) | changes)).text())


@pytest.mark.parametrize(
    "call",
    [
        lambda board: board.write("x", "y"),
        lambda board: board.read("x"),
        lambda board: board.of_ranks("x", range(2)),
        lambda board: board.claim("x"),
    ],
)
def test_nobody_waits_for_a_store_that_is_stopped(store, call):
    board = Board()
    store.runs.clear()
    began = time.monotonic()
    for _ in range(60):
        with pytest.raises(RuntimeError, match="the store of the job gives no answer"):
            call(board)
    assert time.monotonic() - began < 2.0, "who waits once does not wait for each"
    store.runs.set()
    while board.asking.locked():
        time.sleep(0.001)
    call(board)


def test_all_that_have_spoken_are_one_question(store):
    board = Board()
    for rank in range(50):
        board.write(f"words/{rank}", "long")
    before = store.questions
    assert board.silent("words", range(50)) == set()
    assert store.questions == before + 1
    assert board.silent("words", range(52)) == {50, 51}
    assert board.of_ranks("words", [3, 51]) == {3: "long"}


def test_a_stopped_rank_that_has_the_store_is_named_once_and_killed(store, watchdog, process, tmp_path, capfd):
    dogs = [watchdog(1), watchdog(2), watchdog(2, here=[2])]
    beat(dogs[0], 0, process.pid)
    for dog in dogs:
        assert dog._look_around() == ""
    process.suspend()
    store.runs.clear()
    stuck = []
    for dog in dogs:
        dog.now += LIMITS.hang - 1
        assert dog._look_around() == "", "a store may be slow for a while"
        dog.now += 2
        why = dog._look_around()
        assert why == f"rank {dog.rank} has not moved for 11 s, and hears of no other"
        stuck.append(dog.ending.tell(why, dog._last_words()))
    assert [[one.pid for one in beats] for beats in stuck] == [[process.pid], [process.pid], []]
    told = (tmp_path / "hang.txt").read_text()
    assert told.count("this job ends") == 1
    assert f"rank 0 on vm (process {process.pid}): its process is stopped, by SIGSTOP" in told
    assert "It has the store of the job" in told
    assert "rank 1 on" in told.split("Who waits")[1]
    error = capfd.readouterr().err
    assert error.count("this job ends") == 1
    assert error.count("the watch sees this host alone") == 2, "one rank a host"


def test_from_another_host_the_rank_that_has_the_store_is_called_silent(store, watchdog, process, tmp_path):
    dog = watchdog(1, here=[1, 2])
    beat(dog, 0, process.pid, pids="elsewhere")
    assert dog._look_around() == ""
    store.runs.clear()
    assert dog.ending.tell("rank 1 lost its peers", dog._last_words()) == []
    told = (tmp_path / "hang.txt").read_text()
    assert "rank 0 on vm" in told
    assert (
        "no answer: its process, its host or its network is gone, or it is stopped. It has the store of the job" in told
    )


def test_torchrun_is_said_to_have_the_store_where_it_has(store, watchdog, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    dog = watchdog(1)
    store.runs.clear()
    dog.ending.tell("rank 1 lost its peers", dog._last_words())
    held = (tmp_path / "hang.txt").read_text().split("Who waits")[0]
    assert "torchrun has it where the job was started" in held
    assert "rank 0" not in held


def test_a_neighbour_that_is_gone_is_noticed_without_the_store(store, watchdog, process):
    dog = watchdog(2)
    beat(dog, 1, process.pid)
    assert dog._look_around() == ""
    process.kill()
    process.wait()
    store.runs.clear()
    assert dog._look_around() == f"the process {process.pid} of rank 1 on vm is gone"


def test_who_has_rightly_waited_is_not_blamed_when_the_wait_is_over(watchdog):
    """Its last beat is older than that of the rank for which it has waited."""
    dog = watchdog(0)
    beat(dog, 1, os.getpid(), still=50.0)
    beat(dog, 2, os.getpid(), patient=True, phase="saving", count=1)
    assert dog._look_around() == ""
    beat(dog, 2, os.getpid(), count=2)
    found = []
    for _ in range(14):
        dog.now += 1
        dog.moved = dog.now
        for rank in (1, 2):
            beat(dog, rank, os.getpid(), still=50.0 * (rank == 1), count=int(dog.now) + 2)
        found.append(dog._look_around())
    assert found[:11] == [""] * 11, "ten seconds, and one look more"
    assert found[11].startswith("rank 1 has not moved for 5")


def test_one_beat_that_is_old_gives_no_alarm(watchdog):
    dog = watchdog(0)
    dog.patient = -100.0
    for still, alarmed in ((11.0, False), (0.0, False), (11.0, False), (11.2, True)):
        beat(dog, 1, os.getpid(), still=still, count=int(10 * dog.now))
        dog.now += 0.2
        dog.moved = dog.now
        assert bool(dog._look_around()) == alarmed


def test_a_job_that_was_suspended_has_not_hung(watchdog, monkeypatch):
    """Nobody's time runs meanwhile, neither for itself nor for the others."""
    dog = watchdog(0)
    clock = iter([0.0, 0.5, 1.0, 5001.0, 5001.5])
    monkeypatch.setattr("nemohybrid.train.watch.watchdog.time", SimpleNamespace(monotonic=lambda: next(clock)))
    turns = iter([False] * 4 + [True])
    monkeypatch.setattr(dog, "closing", SimpleNamespace(wait=lambda _: next(turns)))
    dog._watch()
    assert 1.5 < dog.now <= 1.5 + 2 * dog.beat_s
    assert not dog.is_ending


def test_an_evaluation_that_always_waits_at_one_line_moves(watchdog, monkeypatch):
    dog = watchdog(0)
    monkeypatch.setattr(dog.stacks, "of", lambda _: (("x.py", 3, "tolist"),))
    dog.activity.enter(doing.EVALUATING)
    for moves in (True, False, True):
        dog.now += 1
        dog.activity.moves += moves
        dog._glance(1.0)
        assert (dog.moved == dog.now) == moves


def test_a_run_tells_of_each_batch_that_it_scores_and_of_orders_that_it_makes(start, monkeypatch):
    phases, real = [], RunData.batch
    monkeypatch.setattr(RunData, "is_ready", lambda _, step: step != 2)
    monkeypatch.setattr(RunData, "batch", lambda self, step: phases.append(runs[0].activity.phase) or real(self, step))
    runs, begin = [], Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *rest: runs.append(self) or begin(self, *rest))
    trainer = start("train.steps=3", "train.evaluate_every=0")
    assert phases == [doing.DATA, doing.ORDERING, doing.DATA]
    trainer.callbacks, before = (), trainer.activity.moves
    trainer.evaluate()
    assert trainer.activity.moves - before >= 5


def test_a_rank_that_was_asked_to_stop_is_no_fault_to_report(store, watchdog, tmp_path, capfd):
    stopped = watchdog(1)
    stopped.run = lambda: None
    stopped.start()
    stopped.close(f"{Stopped.__name__}: stopped by SIGTERM at once")
    other = watchdog(0, here=[0])
    assert other.ending.tell("rank 0 lost its peers", other._last_words()) == []
    assert not (tmp_path / "hang.txt").exists()
    assert "for a rank of it was stopped by SIGTERM at once" in capfd.readouterr().err


def test_a_rank_that_is_done_is_neither_blamed_nor_killed(watchdog, process, tmp_path):
    dog = watchdog(0)
    for rank in (1, 2):
        beat(dog, rank, process.pid, left=DONE if rank == 1 else "")
    dog._look_around()
    dog.ending.collect_s = 0.05
    assert [one.rank for one in dog.ending.tell("rank 0 has not moved", dog._last_words())] == [2]
    held = (tmp_path / "hang.txt").read_text().split("Who waits")[0]
    assert "rank 2 on" in held
    assert "rank 1 on" not in held


@pytest.mark.parametrize("of_torchrun", [False, True])
def test_who_has_the_store_stays_until_the_others_have_read_why_it_leaves(watchdog, monkeypatch, of_torchrun):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(of_torchrun))
    dog = watchdog(0, limits=Limits(3.0, 3.0))
    beat(dog, 1, os.getpid())
    dog.run = lambda: None
    dog.start()
    began = time.monotonic()
    dog.close("ValueError: x")
    assert (time.monotonic() - began > 0.3) == (not of_torchrun)
    assert dog.hearing.listen([0], 0.0)[0].left == "ValueError: x"


def test_who_leaves_last_does_not_stay(watchdog):
    dog = watchdog(0, limits=Limits(1000.0, 1000.0))
    for rank in (1, 2):
        beat(dog, rank, os.getpid(), left=DONE)
    dog.run = lambda: None
    dog.start()
    began = time.monotonic()
    dog.close(DONE)
    assert time.monotonic() - began < dog.beat_s / 2


def test_a_process_ends_with_all_that_it_has_started(run_child, tmp_path):
    def member() -> None:
        child = subprocess.Popen(["sleep", "100"])
        (tmp_path / "child").write_text(str(child.pid))
        processes.leave_nothing(HUNG)

    assert run_child(member) == HUNG
    child = int((tmp_path / "child").read_text())
    for _ in range(500):
        if processes.state_of(child) == processes.GONE:
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("a child is left")


@pytest.mark.parametrize("hears", [True, False])
def test_a_main_thread_that_cannot_end_is_ended(run_child, tmp_path, monkeypatch, hears):
    """By a thread, and where none gets its turn by a clock that needs no interpreter."""
    monkeypatch.setattr(ending, "_SPARE_S", 0.2)
    if not hears:
        monkeypatch.setattr(ending, "leave_nothing", lambda status: time.sleep(100))

    def member() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        one: Ending = Ending.__new__(Ending)
        one.collect_s = 0.0
        one.make_sure()
        time.sleep(100)

    assert run_child(member) == (HUNG if hears else 1)


def test_a_line_about_a_slow_rank_is_not_kept_in_a_buffer(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(file, 10_000)))  # pyright: ignore[reportArgumentType]
    activity = Activity()
    activity.seen.append("rank 1 on vm is slow")
    Stragglers().on_step_end(SimpleNamespace(activity=activity), SimpleNamespace(step=7, metrics={}))  # pyright: ignore
    assert file.getvalue() == b"step 7: rank 1 on vm is slow\n"
