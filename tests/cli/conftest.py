"""Commands in this process or in a fresh one, always in an empty folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemohybrid.__main__ import main

SMALL = [
    "data=shakespeare",
    "data.tokenizer=byte",
    "model=tiny",
    "model.hidden_size=32",
    "model.ssm_state_size=8",
    'model.pattern="M-*"',
    "model.dtype=float32",
    "data.sequence_length=32",
    "train.global_batch=2",
    "train.steps=2",
    "run.device=cpu",
    "logging.picture=false",
]


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
    return [*SMALL, f"data.cache={tmp_path_factory.getbasetemp()}/cli_cache"]


@pytest.fixture
def nemohybrid(capfd) -> Callable[..., tuple[int, str, str]]:
    """`nemohybrid("params", ...) -> (exit status, stdout, stderr)` in this process."""

    def command(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return code, out, err

    return command


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
