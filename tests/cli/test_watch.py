"""The watch under the real torchrun, which ends the other ranks on its own account."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemohybrid.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def job(small, empty_folder):
    """torchrun with three ranks in the middle of a long run in `run`; nothing of it is left afterwards."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "nemohybrid", "train"]
    watch = ["cluster.hang_seconds=3", "cluster.timeout_minutes=1", "train.global_batch=3", "logging.console=quiet"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *small, *watch, "train.steps=1000000", "run.dir=run", "checkpoint.every=0"],
        cwd=empty_folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = empty_folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    yield process
    process.kill()
    process.communicate()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.parametrize(
    "number, told",
    [
        (signal.SIGKILL, "dead: its process is gone"),
        (signal.SIGSTOP, "its process is stopped, by SIGSTOP or a debugger"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_with_a_report_and_leaves_nothing(job, empty_folder, number, told, rank):
    everyone = [job.pid, *(child.pid for child in psutil.Process(job.pid).children(recursive=True))]
    began = time.monotonic()
    worker(job, rank).send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 1, out
    assert time.monotonic() - began < 25
    assert not [pid for pid in everyone if psutil.pid_exists(pid)]
    report = (empty_folder / "run" / "hang.txt").read_text()
    held, waits = report.split("Who waits")
    assert re.search(rf"rank {rank} on \S+ \(process \d+\): {told}", held), report
    assert re.search(r"at nemohybrid/\S+:\d+ in", waits), report
    assert re.search(r"waiting in (all|reduce)_\w+", waits), report
    assert "Held up by" in out
    assert len(report.split("Held up by")) == 2, "one report"


def test_the_same_command_goes_on_after_a_hang(job, small, nemohybrid, empty_folder):
    worker(job, 1).send_signal(signal.SIGSTOP)
    job.communicate(timeout=60)
    done = read_metrics(empty_folder / "run" / "metrics.jsonl")[-1]["step"]
    words = [*small, "train.global_batch=3", "train.steps=4", "run.dir=run"]
    assert done > 4
    assert nemohybrid("train", *words)[0] == 0
    assert (Path("run") / "checkpoints" / "step_00000004").is_dir()
