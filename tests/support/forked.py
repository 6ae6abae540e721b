"""Children and Gloo worlds forked from the test process, which has the slow imports already: a rank costs milliseconds."""

import contextlib
import faulthandler
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

DEADLINE_S = 60.0
STACKS = signal.SIGUSR2
"""What a child answers by writing down where its threads stand."""
GRACE_S = 5.0


def fork(action: Callable[[], object], failure: Path) -> int:
    """Run `action` in a forked child; its traceback, if any, goes to the file `failure`. Returns the child's id."""
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside torch's idle threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        faulthandler.register(STACKS, stacks_of(failure).open("w"))
        action()
        code = 0
    except BaseException:
        failure.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def stacks_of(failure: Path) -> Path:
    """Where a child that has no failure to write down writes its stacks."""
    return failure.with_name(f"stacks-{failure.name}")


def wait(child: int) -> int:
    """The exit status of a child: 0, 1, or minus the signal that ended it. A hanging child is killed and reported."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a child did not end within {DEADLINE_S} s")


def run_world(size: int, action: Callable[[int], object], folder: Path) -> list[Path]:
    """`action(rank)` on `size` Gloo ranks -> the files with the tracebacks of those that failed, first failure first.

    `folder` must be empty. The name of a file ends in the rank. Peers of a rank that failed mostly fail too, with less to
    say; those that wait for it instead are killed after a grace period.
    """

    def member(rank: int) -> None:
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        dist.barrier()
        action(rank)
        dist.barrier()  # a rank that leaves early makes its peers fail
        store.add("passed", 1)
        while (
            store.add("passed", 0) < size
        ):  # and one whose sockets close while a peer still reads the barrier's last words
            time.sleep(0.001)

    children = {rank: fork(lambda rank=rank: member(rank), folder / f"failure{rank}") for rank in range(size)}
    codes = wait_for_all(children, DEADLINE_S)
    for rank, number in ((rank, -code) for rank, code in codes.items() if code < 0):
        why = "hung, or waited for a rank that had failed" if number == signal.SIGKILL else f"died of signal {number}"
        failure = folder / f"failure{rank}"
        failure.write_text(f"rank {rank} {why}\n{stacks_of(failure).read_text()}")
    return sorted(folder.glob("failure*"), key=lambda file: file.stat().st_mtime_ns)


def wait_for_all(children: dict[int, int], deadline: float) -> dict[int, int]:
    """Rank -> exit status of its process; -9 for those that did not end in time, or not soon after a peer's failure."""
    codes: dict[int, int] = {}
    end = time.monotonic() + deadline
    while len(codes) < len(children) and time.monotonic() < end:
        for rank, child in children.items():
            if rank not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                end = min(end, time.monotonic() + GRACE_S) if codes[rank] else end
        time.sleep(0.001)
    hung = children.keys() - codes.keys()
    for number, pause in ((STACKS, 0.5), (signal.SIGKILL, 0)):
        for rank in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[rank], number)
        time.sleep(pause if hung else 0)
    for rank in hung:
        os.waitpid(children[rank], 0)
        codes[rank] = -signal.SIGKILL
    return codes
