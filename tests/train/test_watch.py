"""Jobs that hang, lose a rank or wait for a slow one: real Gloo ranks, and what the watch says and does."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch._dynamo  # this and the next before ranks are forked: each would spend seconds on it
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
from forked import fork, wait_for_all

from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel import collectives, world
from nemohybrid.parallel.context import Axes
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.data import RunData
from nemohybrid.train.run import run
from nemohybrid.train.watch.watchdog import HUNG

pytestmark = pytest.mark.alone
QUICK = ["train.steps=8", "cluster.hang_seconds=2", "cluster.timeout_minutes=0.5"]
BOUND_S = 12.0
"""From the hang to the end of the last process: two seconds of hanging, two of listening, and slow cores."""
STEP = 5
"""The step in which something goes wrong: first ones may take long."""


@pytest.fixture
def ranks(tmp_path) -> Callable[..., dict[int, int]]:
    """`ranks(action, size=2, axes=Axes()) -> exit status of each`: `action(context)` on forked ranks with a store elsewhere.

    Asserts that all end within a bounded time after what the fixture `goes_wrong` does.
    """

    def forked(action: Callable, size: int = 2, axes: Axes | None = None) -> dict[int, int]:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

        def member(rank: int) -> None:
            os.dup2(os.open(tmp_path / f"stderr{rank}", os.O_CREAT | os.O_WRONLY), 2)
            store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            action(world.divide(torch.device("cpu"), axes))
            dist.barrier()

        children = {rank: fork(lambda rank=rank: member(rank), tmp_path / f"traceback{rank}") for rank in range(size)}
        codes = wait_for_all(children, 50)
        assert not any(psutil.pid_exists(child) for child in children.values()), "a process is left"
        if (began := tmp_path / "began").exists():
            assert time.time() - float(began.read_text()) < BOUND_S
        return codes

    return forked


@pytest.fixture
def goes_wrong(tmp_path, monkeypatch) -> Callable[..., None]:
    """`goes_wrong(owner, method, rank, deed)`: in step `STEP`, `deed()` before `owner.method` on that rank.

    What `deed` returns, if anything, is returned in place of the method's.
    """

    def plant(owner: type, method: str, rank: int, deed: Callable[[], object]) -> None:
        real = getattr(owner, method)

        def faulty(self, *arguments):
            step = arguments[0] if isinstance(self, RunData) else self.step
            if self.context.rank == rank and step == STEP and not (tmp_path / "began").exists():
                (tmp_path / "began").write_text(str(time.time()))
                if (instead := deed()) is not None:
                    return instead
            return real(self, *arguments)

        monkeypatch.setattr(owner, method, faulty)

    return plant


def told(tmp_path: Path, *reporters: int) -> str:
    """The report: in the run folder, and on stderr of one of these ranks alone."""
    text = (tmp_path / "run" / "hang.txt").read_text()
    body = text.split(": ", 1)[1].strip()
    speaking = [rank for rank in range(4) if "this job ends" in _stderr(tmp_path, rank)]
    assert speaking in ([rank] for rank in reporters), text
    assert body in _stderr(tmp_path, speaking[0])
    return text


def _stderr(tmp_path: Path, rank: int) -> str:
    file = tmp_path / f"stderr{rank}"
    return file.read_text() if file.exists() else ""


VICTIMS = pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
"""Rank 0 writes the report, so without it another must."""


def sleep_for_ever() -> None:
    time.sleep(1000)


def test_a_rank_that_sleeps_in_a_phase_is_named_with_its_line(configure, ranks, goes_wrong, tmp_path):
    goes_wrong(RunData, "batch", 1, sleep_for_ever)
    config = configure(*QUICK, world_size=2)
    assert ranks(lambda context: run(config, context)) == {0: HUNG, 1: HUNG}
    report = told(tmp_path, 0)
    held, waits = report.split("Who waits")
    assert re.search(r"rank 1 on \S+ \(process \d+\): it is in no collective", held), report
    assert f"step {STEP}, reading data" in held
    assert re.search(r"at nemohybrid/train/trainer\.py:\d+ in train_step: batch = self\.data\.batch\(step\)", held), (
        report
    )
    assert "in sleep_for_ever: time.sleep(1000)" in held
    assert re.search(rf"rank 0 on \S+: step {STEP}, .* waiting in all_reduce", waits), report
    assert re.search(r"at nemohybrid/parallel/collectives\.py:\d+ in sum_over: dist\.all_reduce\(", waits), report
    assert "at nemohybrid/train/step.py" in waits


def test_a_rank_that_skips_a_collective_is_named_by_its_counts(configure, ranks, monkeypatch, tmp_path):
    calls = []

    def largest(value, context):
        calls.append(value)
        skips = context.rank == 1 and len(calls) == STEP
        return value if skips else collectives.largest(value, context)

    monkeypatch.setattr("nemohybrid.train.trainer.largest", largest)
    config = configure(*QUICK, "parallel.tensor=2", world_size=4)
    codes = ranks(lambda context: run(config, context), 4, Axes(tensor=2))
    assert set(codes.values()) == {HUNG}
    report = told(tmp_path, 0)
    held, waits = report.split("Who waits")
    assert re.search(r"rank 1 on .*: it has entered \d+ collectives of the world group of ranks 0-3, others \d+", held)
    assert not re.search(r"rank [023] on", held), report
    assert re.search(rf"ranks 0, 2, 3 on \S+: step {STEP}, agreement, .* waiting in all_reduce", waits), report
    assert re.search(r"at nemohybrid/parallel/collectives\.py:\d+ in largest_over", waits), report


@VICTIMS
def test_a_rank_that_is_killed_is_called_dead(configure, ranks, goes_wrong, tmp_path, victim):
    goes_wrong(RunData, "batch", victim, lambda: os.kill(os.getpid(), signal.SIGKILL))
    config = configure(*QUICK, world_size=2)
    codes = ranks(lambda context: run(config, context))
    assert codes.pop(victim) == -signal.SIGKILL
    assert 0 not in codes.values()
    report = told(tmp_path, 1 - victim)
    held, waits = report.split("Who waits")
    assert re.search(rf"rank {victim} on \S+ \(process \d+\): dead: its process is gone", held), report
    assert re.search(r"last heard of in step \d, [a-z]|not heard of since it began", held), report
    assert re.search(rf"rank {1 - victim} on \S+: step {STEP}, .* waiting in all_reduce", waits), report
    assert re.search(r"at nemohybrid/parallel/collectives\.py:\d+ in sum_over: dist\.all_reduce\(", waits), report


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_is_told_and_killed(configure, ranks, goes_wrong, tmp_path, victim):
    goes_wrong(RunData, "batch", victim, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    config = configure(*QUICK, "cluster.timeout_minutes=0.15", world_size=2)
    codes = ranks(lambda context: run(config, context))
    assert codes.pop(victim) == -signal.SIGKILL, "it would be left behind"
    assert codes.popitem()[1] in (HUNG, 1)
    held, _ = told(tmp_path, 1 - victim).split("Who waits")
    assert re.search(rf"rank {victim} on \S+ \(process \d+\): its process is stopped, by SIGSTOP", held)


def test_a_rank_that_ends_with_an_error_of_its_own_is_quoted(configure, ranks, goes_wrong, tmp_path):
    def fails() -> None:
        raise ArithmeticError("a fault of this rank alone")

    goes_wrong(RunData, "batch", 1, fails)
    config = configure(*QUICK, world_size=2)
    assert ranks(lambda context: run(config, context)) == {0: 1, 1: 1}
    assert "rank 1 on" in told(tmp_path, 0)
    assert "it has ended: ArithmeticError: a fault of this rank alone" in told(tmp_path, 0)


def test_long_saves_evaluations_and_first_steps_end_nothing(configure, ranks, monkeypatch, tmp_path):
    """Each takes one rank longer than a step may hang."""
    real_batch = RunData.batch

    class Slow(Callback):
        def on_step_end(self, trainer, result) -> None:
            if result.step == STEP:
                time.sleep(3)

    def batch(self, step: int):
        if self.context.rank == 1 and step == 1:
            time.sleep(3)
        return real_batch(self, step)

    monkeypatch.setattr(RunData, "batch", batch)
    monkeypatch.setattr("nemohybrid.train.run.standard", lambda config, is_main: [Slow()] if is_main else [])
    config = configure(*QUICK, world_size=2)
    assert ranks(lambda context: run(config, context)) == {0: 0, 1: 0}
    assert not (tmp_path / "run" / "hang.txt").exists()


def test_a_slow_rank_is_named_while_the_run_goes_on(configure, ranks, monkeypatch, tmp_path, capfd):
    real = RunData.batch

    def batch(self, step: int):
        if self.context.rank == 1:
            time.sleep(0.25)
        return real(self, step)

    monkeypatch.setattr(RunData, "batch", batch)
    monkeypatch.setattr("nemohybrid.train.watch.straggler.WINDOW_S", 0.7)
    monkeypatch.setattr("nemohybrid.train.watch.watchdog.LONGEST_BEAT_S", 0.05)
    config = configure("train.steps=24", world_size=2)
    assert ranks(lambda context: run(config, context)) == {0: 0, 1: 0}
    line = r"step \d+: rank 1 on \S+ is \d+\.\dx slower than the median of its peers, for \d+ steps by now"
    out = capfd.readouterr().out
    assert len(re.findall(line, out)) == 1, out
    assert "rank 0 on" not in out
    named = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "slowest_rank" in record]
    assert named[-1]["slowest_rank"] == 1
    assert named[-1]["slowest_ratio"] > 1.3
