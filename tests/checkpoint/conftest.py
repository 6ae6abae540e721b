"""Small checkpoints, forked children, and forked Gloo worlds for the checkpoint tests.

Children are forked from this process, which has torch imported: a child costs milliseconds, not seconds.
"""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.tensor

from nemohybrid.checkpoint import save_checkpoint

DEADLINE_S = 60.0


def small_tensors(version: int) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and shapes, all telling which version of a run they belong to."""
    return {
        "model.weight": torch.full((6, 4), float(version)),
        "model.norm": torch.full((3,), float(version), dtype=torch.bfloat16),
        "optimizer.step": torch.tensor(version),
    }


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
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a child did not end within {DEADLINE_S} s")


@pytest.fixture
def tensors_of() -> Callable[[int], dict[str, torch.Tensor]]:
    return small_tensors


@pytest.fixture
def run_child(tmp_path_factory):
    """`run_child(action) -> exit status` in a forked child."""
    failure = tmp_path_factory.mktemp("child") / "traceback"
    return lambda action: wait(fork(action, failure))


@pytest.fixture
def run_ranks(tmp_path_factory):
    """`run_ranks(size, action)`: `action(rank)` on `size` forked Gloo ranks; fails with the first traceback."""

    def run(size: int, action: Callable[[int], object]) -> None:
        folder = tmp_path_factory.mktemp("world")

        def member(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
            dist.barrier()
            action(rank)
            dist.barrier()  # a rank that leaves early makes its peers fail
            dist.destroy_process_group()

        children = [fork(lambda rank=rank: member(rank), folder / f"failure{rank}") for rank in range(size)]
        codes = [wait(child) for child in children]
        failures = sorted(folder.glob("failure*"), key=lambda path: path.stat().st_mtime_ns)
        assert not failures, f"{failures[0].name}:\n{failures[0].read_text()}"
        assert codes == [0] * size, f"ranks ended with {codes}"

    return run


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A root with sound checkpoints of steps 10 and 20 (versions 1 and 2); copy it, do not change it."""
    root = tmp_path_factory.mktemp("template")
    for version, step in enumerate((10, 20), start=1):
        extra = {"config.yaml": "model: tiny\n", "tokenizer.json": b"{}"}
        save_checkpoint(root, step, small_tensors(version), {"version": version}, extra)
    return root
