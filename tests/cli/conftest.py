"""Commands in this process or in a fresh one, always in an empty folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import SMALL, in_this_process


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    """Every test here works in a folder with nothing in it."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def small(tmp_path_factory) -> list[str]:
    """Overrides of a run of two steps; the prepared text is kept from test to test."""
    return [*SMALL, "train.global_batch=2", "train.steps=2", f"data.cache={tmp_path_factory.getbasetemp()}/cli_cache"]


@pytest.fixture
def nemohybrid(capfd) -> Callable[..., tuple[int, str, str]]:
    """`nemohybrid("params", ...) -> (exit status, stdout, stderr)` in this process."""

    return lambda *arguments: in_this_process(capfd, *arguments)


@pytest.fixture
def fresh(empty_folder) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`fresh("-m", "nemohybrid", ...)`: a new interpreter in the empty folder, without what this one has imported."""

    def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=empty_folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=200,
        )

    return python
