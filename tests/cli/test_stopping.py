"""Signals under the real torchrun, to one worker and to torchrun itself, and in a sweep."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nemohybrid.train.trainer import Trainer


@pytest.fixture
def job(small, empty_folder) -> Iterator[subprocess.Popen[str]]:
    """torchrun with two ranks in the middle of a long run in `run`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nemohybrid", "train"]
    process = subprocess.Popen(
        [sys.executable, *launcher, *small, "train.steps=1000000", "run.dir=run", "checkpoint.every=0"],
        cwd=empty_folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: steps_of(empty_folder / "run"), process)
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
        process.communicate()


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)


def steps_of(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()[:-1]] if file.exists() else []


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def assert_saved_where_it_stopped(out: str, name: str, folder: Path) -> None:
    match = re.search(rf"stopped by {name} at step (\d+) of 1000000, saved run/checkpoints/step_(\d+)", out)
    assert match, out
    assert int(match[1]) == int(match[2])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{match[2]}"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == int(match[1])


def test_a_signal_to_one_worker_saves_one_step_on_both_and_torchrun_reports_the_status(job, empty_folder):
    worker(job, 1).send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=60)
    assert_saved_where_it_stopped(out, "SIGUSR1", empty_folder / "run")
    assert job.returncode == 1, "torchrun itself ends with 1 whatever its workers end with"
    assert re.search(r"exitcode *: 75", out), out


def test_a_signal_to_torchrun_reaches_the_workers_and_the_step_is_saved(job, empty_folder):
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert_saved_where_it_stopped(out, "SIGTERM", empty_folder / "run")


def test_a_signal_ends_a_sweep_and_not_only_its_job(nemohybrid, small, empty_folder, monkeypatch):
    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: os.kill(os.getpid(), signal.SIGTERM) or real(self))
    code, out, err = nemohybrid("train", "-m", *small, "run.dir=sweep", "optim.lr=1e-3,1e-4")
    assert code == 75, err
    assert "stopped by SIGTERM at step 1 of 2, saved sweep/0/checkpoints/step_00000001" in out
    assert [path.name for path in (empty_folder / "sweep").iterdir() if path.is_dir()] == ["0"], "the next job began"
