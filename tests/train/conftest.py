"""Tiny runs inside this process, their corpus, and forked Gloo ranks."""

import contextlib
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

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.data.bundled import plays
from nemohybrid.data.prepare import prepare
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer

DEADLINE_S = 60.0
TINY = [
    "model=tiny",
    "model.hidden_size=32",
    "model.ssm_state_size=8",
    'model.pattern="M-*"',
    "model.dtype=float32",
    "data.sequence_length=32",
    "train.global_batch=4",
    "train.steps=4",
    "optim.lr=1e-3",
    "logging.console=quiet",
    "logging.picture=false",
    "run.device=cpu",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order everywhere, and nothing of OpenMP to go wrong in forked children."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with byte-tokenized corpora: `train`, and `valid` of 700 characters."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in (("train", plays()[0].text[:20_000]), ("valid", plays()[-1].text[:700])):
        (folder / f"{name}.txt").write_text(text)
        prepare([folder / f"{name}.txt"], folder / name, load_tokenizer("byte"))
    return folder


@pytest.fixture
def configure(corpus, tmp_path) -> Callable[..., RunConfig]:
    """`configure("train.steps=3")`: a tiny checked run in <tmp_path>/run; what is given last counts."""

    def compose(*overrides: str, world_size: int = 1) -> RunConfig:
        data = [f"data.train={corpus}/train", f"data.valid={corpus}/valid", f"data.cache={corpus}/cache"]
        return load_config([*TINY, *data, f"run.dir={tmp_path}/run", *overrides], world_size)

    return compose


@pytest.fixture
def start(configure) -> Callable[..., Trainer]:
    """`start("train.steps=3") -> Trainer`, after the run has come to its end."""
    return lambda *overrides: run(configure(*overrides), ParallelContext.single())


def fork(action: Callable[[], object], failure: Path) -> int:
    """Run `action` in a forked child, whose traceback goes to `failure`: the slow imports are there already."""
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
    """The exit status of a child, minus the signal that ended it. One that hangs is killed and reported."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a child did not end within {DEADLINE_S} s")


@pytest.fixture
def run_child(tmp_path):
    """`run_child(action) -> exit status` of a forked child."""
    return lambda action: wait(fork(action, tmp_path / "child_traceback"))


@pytest.fixture
def run_ranks(tmp_path_factory):
    """`run_ranks(action, size=2) -> tracebacks`: `action(context)` on forked Gloo ranks, what each failed with or ""."""

    def ranks(action: Callable[[ParallelContext], object], size: int = 2) -> list[str]:
        folder = tmp_path_factory.mktemp("world")

        def member(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
            context = ParallelContext(torch.device("cpu"), rank, size, data=Group(size, rank, dist.group.WORLD))
            action(context)
            dist.barrier()  # a rank that leaves early makes its peers fail
            dist.destroy_process_group()

        failures = [folder / f"failure{rank}" for rank in range(size)]
        children = [fork(lambda rank=rank: member(rank), failures[rank]) for rank in range(size)]
        codes = [wait(child) for child in children]
        texts = [file.read_text() if file.exists() else "" for file in failures]
        assert [bool(code) for code in codes] == [bool(text) for text in texts], f"ranks ended with {codes}"
        return texts

    return ranks
