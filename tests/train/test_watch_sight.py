"""What the watch sees of a thread: its line, its expression, and the collective it waits in."""

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import psutil
import pytest
import torch
import torch.distributed as dist
from forked import run_world

from nemohybrid.parallel import collectives
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.watch.processes import GONE, RUNS, STOPPED, kill, started_at, state_of
from nemohybrid.train.watch.sight import DEVICE, Glances, frame_of, look, signature, stack_of, waits_in, where_raised


class Elsewhere(threading.Thread):
    """A thread that runs `action`, to be looked at."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.action = action

    def run(self) -> None:
        self.action()

    def frame(self, seconds: float = 0.3) -> FrameType:
        self.start()
        time.sleep(seconds)
        return sys._current_frames()[self.ident]


def module(name: str, source: str) -> dict:
    """The names of a module that does not exist."""
    import linecache

    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"__name__": name}
    exec(compile(source, file, "exec"), names)  # noqa: S102 - a module for this test
    return names


def stuck_in(name: str, expression: str) -> list[FrameType]:
    """The stack of a thread that stands in `expression`, on a line of module `name`."""
    blocked = threading.Event()
    names = module(name, f"def stands():\n    return (1,\n        {expression})\n")
    names |= {"x": Blocks(blocked), "dist": Blocks(blocked), "functional": Blocks(blocked)}
    thread = Elsewhere(names["stands"])
    frame = thread.frame(0.05)
    stack = stack_of(frame)
    blocked.set()
    return [f for f in stack if f.f_globals["__name__"] == name]


class Blocks:
    """Every method of it waits."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __getattr__(self, _: str) -> Callable:
        return lambda *_: self.event.wait(5)


@pytest.mark.parametrize(
    "name, expression, found",
    [
        ("nemohybrid.parallel.collectives", "dist.all_reduce(0)", "all_reduce"),
        ("nemohybrid.parallel.collectives", "functional.wait_tensor(0)", "a collective"),
        ("nemohybrid.parallel.pipeline", "x.work.wait()", "a transfer between ranks"),
        ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "x.all_gather_work.wait()", "all_gather_work"),
        ("nemohybrid.train.trainer", "x.tolist()", DEVICE),
        ("nemohybrid.train.trainer", "x.batch(3)", ""),
        ("somebody.else", "x.tolist()", ""),
        ("somebody.else", "x.wait()", ""),
    ],
)
def test_what_a_line_waits_in(name, expression, found):
    if "work.wait" in expression:
        expression = expression.replace("x.work", "x").replace("x.all_gather_work", "x")
        found = found if name.endswith("pipeline") else "a collective"
    assert waits_in(stuck_in(name, expression)) == found


def test_a_place_is_the_expression_that_runs_and_not_the_statement():
    place = look(stuck_in("nemohybrid.train.trainer", "x.batch(3)")).places[0]
    assert str(place) == "nemohybrid/train/trainer.py:3 in stands: x.batch(3)"


def test_a_thread_that_stands_still_has_the_same_signature_and_one_that_moves_another():
    still = Elsewhere(threading.Event().wait)
    frame = still.frame(0.1)
    assert signature(frame) == signature(sys._current_frames()[still.ident])
    end = threading.Event()

    def moves() -> None:
        while not end.is_set():
            time.sleep(0.001)
            sum(range(50))
            threading.Event().wait(0.001)

    moving = Elsewhere(moves)
    seen = {signature(moving.frame(0.1))}
    for _ in range(40):
        time.sleep(0.005)
        seen.add(signature(sys._current_frames()[moving.ident]))
    end.set()
    assert len(seen) > 1


def test_where_an_error_was_raised():
    def fails() -> None:
        collectives.own_part(torch.ones(4, 2), Group(size=3, rank=9))

    with pytest.raises(IndexError) as caught:
        fails()
    sight = where_raised(caught.value)
    assert sight is not None
    assert str(sight.places[0]).startswith("nemohybrid/parallel/collectives.py:")
    assert "in own_part: x.narrow(0, group.rank * rows, rows)" in str(sight.places[0])


def waits_for_the_other(rank: int, call: Callable[[], object], names: str) -> None:
    """Rank 1 comes a second late; a thread of rank 0 sees where the main thread is."""
    seen = []

    def watch() -> None:
        time.sleep(0.5)
        stack = stack_of(frame_of(threading.main_thread().ident))
        seen.append(
            (waits_in(stack), Glances().is_waiting(stack[0]), dist.group.WORLD._get_sequence_number_for_group())
        )

    thread = threading.Thread(target=watch)
    thread.start()
    if rank == 1:
        time.sleep(1)
    call()
    thread.join()
    name, waiting, count = seen[0]
    assert (name, waiting) == ((names, True) if rank == 0 else ("", False)), seen
    counts = collectives.gather_json(count, Group(2, rank, dist.group.WORLD), torch.device("cpu"))
    assert counts[0] == counts[1] + 1, "rank 0 has entered one that rank 1 has not"


def test_real_collectives_are_seen_and_counted(tmp_path):
    def member(rank: int) -> None:
        group, context = Group(2, rank, dist.group.WORLD), ParallelContext(torch.device("cpu"), rank, 2)
        waits_for_the_other(rank, lambda: collectives.sum_over(torch.ones(2), group), "all_reduce")
        waits_for_the_other(rank, lambda: collectives.gathered(torch.ones(2), group), "all_gather_into_tensor")
        waits_for_the_other(rank, lambda: collectives.wait_for_all(context), "barrier")

    failures = run_world(2, member, tmp_path)
    assert not failures, failures[0].read_text()


def test_what_the_system_says_of_a_process():
    process = psutil.Popen(["sleep", "100"])
    started = started_at(process.pid)
    try:
        assert state_of(process.pid) == RUNS
        process.suspend()
        deadline = time.monotonic() + 5
        while state_of(process.pid) == RUNS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(process.pid) == STOPPED
        kill(process.pid, started - 1)
        assert state_of(process.pid) == STOPPED, "another process that had the number before"
        kill(process.pid, started)
        while state_of(process.pid) == STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(process.pid) == GONE, "a zombie is gone, too"
    finally:
        process.kill()
        process.wait()
    assert state_of(process.pid) == GONE
