"""One job at a time in a run folder."""

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest

from nemohybrid.__main__ import main
from nemohybrid.errors import TrainingError
from nemohybrid.locking import NO_LOCKS
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.lock import only_job_in
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but the lock: its bytes, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_second_job_is_refused_by_name_and_changes_nothing(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder = tmp_path / "run"
    command("train.stop_at=2")
    before = content(folder)
    with only_job_in(folder):
        holder = (folder / "lock").read_text()
        assert command("optim.lr=0.5") == 1
        assert (folder / "lock").read_text() == holder
    assert set(json.loads(holder)) == {"host", "pid", "job", "since"}, "nothing else of the environment is told"
    error = capfd.readouterr().err
    assert f"run folder {folder} is in use by process {os.getpid()} on " in error
    assert "(SLURM job 4711)" in error
    assert "Wait for it, or give another run.dir" in error
    assert content(folder) == before
    assert command() == 0, "the folder is free again"


def test_a_new_folder_is_refused_before_anything_is_written(command, tmp_path):
    with only_job_in(tmp_path / "run"):
        assert command() == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_killed_job_leaves_no_lock_behind(configure, command, run_child, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert run_child(lambda: run(configure(), ParallelContext.single())) == -signal.SIGKILL
    monkeypatch.undo()
    assert (tmp_path / "run" / "lock").read_text(), "the dead job had the lock"
    assert command() == 0


def test_a_failed_run_frees_its_folder(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command()
    with only_job_in(tmp_path / "run") as notes:
        assert notes == []


def test_every_rank_hears_that_the_folder_is_in_use(configure, run_ranks, tmp_path):
    config = configure(world_size=2)
    with only_job_in(tmp_path / "run"):
        failures = run_ranks(lambda context: run(config, context))
    for rank, failure in enumerate(failures):
        assert "TrainingError: run folder" in failure, f"rank {rank}: {failure}"


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_where_files_cannot_be_locked_the_run_warns_and_goes_on(command, monkeypatch, capfd, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert command("train.steps=1") == 0
    assert "nothing keeps a second job out" in capfd.readouterr().out


def test_a_holder_that_has_not_signed_yet_is_another_job(tmp_path):
    with only_job_in(tmp_path):
        (tmp_path / "lock").write_text("{")
        with pytest.raises(TrainingError, match="in use by another job"), only_job_in(tmp_path):
            pass


def test_reading_a_run_in_progress_is_not_hindered(command, tmp_path, capfd):
    assert command("train.steps=1") == 0
    with only_job_in(tmp_path / "run"):
        words = ["--checkpoint", str(tmp_path / "run"), "--prompt", "A", "--max-new-tokens", "2"]
        assert main(["generate", *words]) == 0, capfd.readouterr().err
