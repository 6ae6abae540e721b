"""Processes that a test starts, watches, and never leaves behind."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PATIENCE_S = 150


MARK = "STARTED_BY_TEST"
"""A variable that all descendants of a process inherit, whatever sessions they make."""


def start(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process, its two outputs in one pipe."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=os.environ | environment | {MARK: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output, once it ends."""
    out, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out


def kill_all(process: subprocess.Popen[str], folder: Path) -> None:
    """The process, and all that was started below it in `folder`: torchrun's ranks have sessions of their own."""
    process.kill()
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            if other.environ().get(MARK) == str(folder):
                other.kill()
    process.communicate()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], told: Callable[[], str] = str) -> None:
    """Until something is so. Fails, with what was `told`, when the process ends before, or it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0] + told()
        assert time.monotonic() < deadline, f"it did not happen: {told()}"
        time.sleep(0.02)


def steps_of(folder: Path) -> list[int]:
    """Of the complete lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()[:-1]] if file.exists() else []
