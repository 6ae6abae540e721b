"""Processes of this host: whether one still runs, and how one ends with all that it has started."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

CLOCK_S = 2.0
GONE, STOPPED = "its process is gone", "its process is stopped, by SIGSTOP or a debugger"
RUNS = "its process runs"


def state_of(pid: int) -> str:
    """`GONE`, `STOPPED` or `RUNS`."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return GONE
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return GONE
    return STOPPED if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else RUNS


def space_of_ids() -> str:
    """Within which the ids of processes are unique."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def kill(pid: int, started: float) -> None:
    """End a process that cannot end itself; not another one that has its number by now."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < CLOCK_S:  # the clock may have been set since
            process.kill()


def started_at(pid: int | None = None) -> float:
    """When a process began, which tells it from a later one with the same number."""
    return psutil.Process(pid).create_time()


def leave_nothing(status: int) -> None:
    """End this process now, whatever its main thread waits for, and the processes that it has started."""
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    os._exit(status)
