"""Jobs that hang, lose a rank or wait for a slow one: real Gloo ranks, and what the watch says and does."""

import os
import re
import signal
import socket
import threading
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

from nemohybrid.errors import HUNG
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel import collectives, world
from nemohybrid.parallel.context import Axes
from nemohybrid.train import evaluation
from nemohybrid.train.callbacks.metrics_file import MetricsFile
from nemohybrid.train.checkpointing import Checkpointer
from nemohybrid.train.data import RunData
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer

pytestmark = pytest.mark.alone
QUICK = ["train.steps=8", "cluster.hang_seconds=2", "cluster.timeout_minutes=0.5"]
BOUND_S = 16.0
"""From the hang to the end of the last process: two seconds of hanging, or five where all are done, five for a store that does
not answer, two of listening, and slow cores."""
STEP = 5
"""The step in which something goes wrong: first ones may take long."""


@pytest.fixture
def ranks(tmp_path, monkeypatch) -> Callable[..., dict[int, int]]:
    """`ranks(action, size=2, axes=Axes()) -> exit status of each`: `action(context)` on forked ranks.

    The store is elsewhere, as under torchrun, or with rank 0, as under SLURM. Asserts that all end within a bounded time
    after what the fixture `goes_wrong` does.
    """

    def forked(action: Callable, size: int = 2, axes: Axes | None = None, with_rank_0: bool = False) -> dict[int, int]:
        server = None if with_rank_0 else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = _free_port() if server is None else server.port
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(not with_rank_0))

        def member(rank: int) -> None:
            os.dup2(os.open(tmp_path / f"stderr{rank}", os.O_CREAT | os.O_WRONLY), 2)
            has_store = with_rank_0 and rank == 0
            store = dist.TCPStore("127.0.0.1", port, is_master=has_store, wait_for_workers=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            del store
            action(world.divide(torch.device("cpu"), axes))
            if dist.is_initialized():
                dist.barrier()

        children = {rank: fork(lambda rank=rank: member(rank), tmp_path / f"traceback{rank}") for rank in range(size)}
        codes = wait_for_all(children, 50)
        assert not any(psutil.pid_exists(child) for child in children.values()), "a process is left"
        if (began := tmp_path / "began").exists():
            assert time.time() - float(began.read_text()) < BOUND_S
        return codes

    return forked


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


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
                time.sleep(0.3)  # a beat more, else the last may be of a first step, in which all are patient
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


VICTIMS = pytest.mark.parametrize(
    "victim, with_rank_0", [pytest.param(0, False, marks=pytest.mark.slow), (0, True), (1, False)]
)
"""Rank 0 writes the report, so without it another must; without the store, too, where rank 0 has it."""


def sleep_for_ever() -> None:
    time.sleep(1000)


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


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
def test_a_rank_that_is_killed_is_called_dead(configure, ranks, goes_wrong, tmp_path, victim, with_rank_0):
    goes_wrong(RunData, "batch", victim, lambda: os.kill(os.getpid(), signal.SIGKILL))
    config = configure(*QUICK, world_size=2)
    codes = ranks(lambda context: run(config, context), with_rank_0=with_rank_0)
    assert codes.pop(victim) == -signal.SIGKILL
    assert 0 not in codes.values()
    report = told(tmp_path, 1 - victim)
    held, waits = report.split("Who waits")
    assert re.search(rf"rank {victim} on \S+ \(process \d+\): dead: its process is gone", held), report
    assert re.search(r"last heard of in step \d, [a-z]|not heard of since it began", held), report
    assert re.search(rf"rank {1 - victim} on \S+: step {STEP}, .* waiting in all_reduce", waits), report
    assert re.search(r"at nemohybrid/parallel/collectives\.py:\d+ in sum_over: dist\.all_reduce\(", waits), report


@pytest.mark.slow
@pytest.mark.parametrize("victim, with_rank_0", [(0, False), (0, True), (1, False), (1, True)])
def test_a_rank_that_is_stopped_is_told_and_killed(configure, ranks, goes_wrong, tmp_path, victim, with_rank_0):
    goes_wrong(RunData, "batch", victim, stop_here)
    config = configure(*QUICK, "train.global_batch=6", world_size=3)
    codes = ranks(lambda context: run(config, context), 3, with_rank_0=with_rank_0)
    assert codes.pop(victim) == -signal.SIGKILL, "it would be left behind"
    assert set(codes.values()) <= {HUNG, 1}
    held, _ = told(tmp_path, *codes).split("Who waits")
    assert re.search(rf"rank {victim} on \S+ \(process \d+\): its process is stopped, by SIGSTOP", held)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_ends_with_an_error_of_its_own_is_quoted(configure, ranks, goes_wrong, tmp_path, victim):
    def fails() -> None:
        raise ArithmeticError("a fault of this rank alone")

    goes_wrong(RunData, "batch", victim, fails)
    config = configure(*QUICK, world_size=2)
    assert ranks(lambda context: run(config, context), with_rank_0=victim == 0) == {0: 1, 1: 1}
    assert f"rank {victim} on" in told(tmp_path, 1 - victim)
    assert "it has ended: ArithmeticError: a fault of this rank alone" in told(tmp_path, 1 - victim)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("deed", [sleep_for_ever, stop_here])
def test_a_rank_that_hangs_when_all_steps_are_done_is_named(configure, ranks, tmp_path, victim, deed):
    """Here the others have nothing left to do but to leave together."""

    def leave() -> None:
        if dist.get_rank() == victim:
            (tmp_path / "began").write_text(str(time.time()))
            deed()
        world.stop()

    config = configure(*QUICK, "train.global_batch=6", "cluster.timeout_minutes=0.1", world_size=3)
    codes = ranks(lambda context: run(config, context, leave=leave), 3, with_rank_0=True)
    assert 0 not in codes.values()
    held, waits = told(tmp_path, *range(3)).split("Who waits")
    assert held.count(" on ") == 1
    assert f"rank {victim} on" in held
    assert "leaving" in waits


@pytest.mark.slow
@pytest.mark.parametrize("with_rank_0", [False, True])
def test_a_job_that_is_suspended_goes_on(configure, ranks, monkeypatch, tmp_path, with_rank_0):
    """`scontrol suspend`, a container that is paused, Ctrl-Z and fg: for longer than a step may hang."""
    real = Trainer.train_step

    def step(self):
        if self.step == STEP:
            (tmp_path / f"pid{self.context.rank}").write_text(str(os.getpid()))
            while not (tmp_path / "stopped").exists():
                time.sleep(0.01)
        time.sleep(0.05)
        return real(self)

    def suspend() -> None:
        files = [tmp_path / f"pid{rank}" for rank in range(2)]
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.01)
        children = [psutil.Process(int(file.read_text())) for file in files]
        for child in children:
            child.suspend()
        (tmp_path / "stopped").touch()
        time.sleep(6)
        for child in children:
            child.resume()

    monkeypatch.setattr(Trainer, "train_step", step)
    threading.Thread(target=suspend, daemon=True).start()
    config = configure(*QUICK, "train.steps=40", world_size=2)
    assert ranks(lambda context: run(config, context), with_rank_0=with_rank_0) == {0: 0, 1: 0}
    assert not (tmp_path / "run" / "hang.txt").exists()


@pytest.mark.slow
def test_an_evaluation_may_take_longer_than_any_of_its_batches(configure, ranks, monkeypatch, tmp_path):
    """As where the host waits for its device at one line: its stack is always the same."""
    real = evaluation.score_batches

    def score(*arguments):
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(evaluation, "score_batches", score)
    few = ["train.steps=4", "train.evaluate_every=4", "train.microbatch=1", "cluster.timeout_minutes=0.05"]
    assert ranks(lambda context: run(configure(*QUICK, *few, world_size=2), context)) == {0: 0, 1: 0}
    assert not (tmp_path / "run" / "hang.txt").exists()


def test_long_saves_evaluations_and_first_steps_end_nothing(configure, ranks, monkeypatch, tmp_path):
    """Each takes one rank longer than a step may hang, while the other waits for it."""

    def slowed(owner: object, name: str, wanted: Callable[..., bool]) -> None:
        real, done = getattr(owner, name), []

        def slow(*arguments):
            if not done and wanted(*arguments):
                done.append(time.sleep(2))
            return real(*arguments)

        monkeypatch.setattr(owner, name, slow)

    slowed(RunData, "batch", lambda data, step: data.context.rank == 1 and step == 1)
    slowed(evaluation, "score_batches", lambda *_: dist.get_rank() == 0)
    slowed(Checkpointer, "save", lambda *_: dist.get_rank() == 1)
    slowed(MetricsFile, "on_step_end", lambda callback, trainer, result: result.step == STEP)
    config = configure(*QUICK, "train.evaluate_every=8", "cluster.hang_seconds=1", world_size=2)
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
