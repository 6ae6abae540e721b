"""Processes that a test starts, watches, and never leaves behind."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 100


def start(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process with a group of its own, its two outputs in one pipe."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output, once it ends."""
    out, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out


def kill_group(process: subprocess.Popen[str]) -> None:
    """The process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
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
