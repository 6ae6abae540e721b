"""Children and Gloo worlds forked from the test process, which has the slow imports already: a rank costs milliseconds."""

import contextlib
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

DEADLINE_S = 60.0


def fork(action: Callable[[], object], failure: Path) -> int:
    """Run `action` in a forked child; its traceback, if any, goes to the file `failure`. Returns the child's id."""
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside torch's idle threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        failure.write_text(traceback.format_exc())
    finally:
        os._exit(code)


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

    `folder` must be empty. The name of a file ends in the rank.
    """

    def member(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        dist.barrier()
        action(rank)
        dist.barrier()  # a rank that leaves early makes its peers fail
        dist.destroy_process_group()

    children = [fork(lambda rank=rank: member(rank), folder / f"failure{rank}") for rank in range(size)]
    codes = [wait(child) for child in children]
    failures = sorted(folder.glob("failure*"), key=lambda file: file.stat().st_mtime_ns)
    assert sum(map(bool, codes)) == len(failures), f"ranks ended with {codes}"
    return failures
