"""A cluster of stand-ins on PATH, in an empty folder, and the command that writes scripts for it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_cluster import Cluster
from processes import kill_all, start
from small_runs import SMALL, in_this_process

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    """Every test here works in a folder with nothing in it. Its name has a space."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def small(tmp_path_factory) -> list[str]:
    """Overrides of a tiny run in `run`; the prepared text is kept from test to test."""
    return [*SMALL, "train.global_batch=4", "run.dir=run", f"data.cache={tmp_path_factory.getbasetemp()}/launch_cache"]


@pytest.fixture
def launch(capfd) -> Callable[..., tuple[int, str, str]]:
    """`launch("slurm", ...) -> (exit status, stdout, stderr)`."""

    return lambda *words: in_this_process(capfd, "launch", *words)


@pytest.fixture
def rendered(launch) -> Callable[..., str]:
    """`rendered("slurm", ...)`: the script."""

    def script(*words: str) -> str:
        first = next((i for i, word in enumerate(words) if word == "--"), len(words))
        code, out, err = launch(*words[:first], "--dry-run", *words[first:])
        assert code == 0, err
        return out

    return script


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def cluster(tmp_path, empty_folder, programs, monkeypatch) -> Iterator[Cluster]:
    """SLURM's commands on PATH."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    for name in ("srun", "scontrol", "sbatch"):
        executable(programs / name, f'exec {sys.executable} -S {SUPPORT / "fake_slurm.py"} {name} "$@"')
    cluster = Cluster(folder, empty_folder)
    yield cluster
    cluster.clean()


@pytest.fixture
def stand_in(programs) -> Callable[..., str]:
    """`stand_in(body) -> path` of a program in place of Python, a script of bash; or of another that is found by its name."""
    return lambda body, name="stand_in": executable(programs / name, body)


def executable(file: Path, body: str) -> str:
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def background(empty_folder) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`background(word, ..., NAME="value")`: a process that does not outlive the test, nor do its children."""
    processes: list[subprocess.Popen[str]] = []

    def run(*words: str, **environment: str) -> subprocess.Popen[str]:
        processes.append(start(list(words), empty_folder, environment))
        return processes[-1]

    yield run
    for process in processes:
        kill_all(process, empty_folder)
