"""Tiny runs inside this process, their corpus, and forked Gloo ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import fork, run_world, wait
from small_runs import TINY

from nemohybrid.__main__ import main
from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.data.bundled import plays
from nemohybrid.data.prepare import prepare
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer

FOUR_STEPS = ["train.global_batch=4", "train.steps=4", "optim.lr=1e-3", "logging.console=quiet"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with byte-tokenized corpora: `train`, and `valid` of 700 characters."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in (("train", plays()[0].text[:20_000]), ("valid", plays()[-1].text[:700])):
        (folder / f"{name}.txt").write_text(text)
        prepare([folder / f"{name}.txt"], folder / name, load_tokenizer("byte"))
    return folder


@pytest.fixture
def tiny_run(corpus, tmp_path) -> list[str]:
    """Overrides of a tiny run in <tmp_path>/run."""
    data = [f"data.train={corpus}/train", f"data.valid={corpus}/valid", f"data.cache={corpus}/cache"]
    return [*TINY, *FOUR_STEPS, *data, f"run.dir={tmp_path}/run"]


@pytest.fixture
def configure(tiny_run) -> Callable[..., RunConfig]:
    """`configure("train.steps=3")`: a tiny checked run; what is given last counts."""
    return lambda *overrides, world_size=1: load_config([*tiny_run, *overrides], world_size)


@pytest.fixture
def command(tiny_run) -> Callable[..., int]:
    """`command("train.steps=3") -> exit status` of `nemohybrid train` in this process."""
    return lambda *overrides: main(["train", *tiny_run, *overrides])


@pytest.fixture
def start(configure) -> Callable[..., Trainer]:
    """`start("train.steps=3") -> Trainer`, after the run has come to its end."""
    return lambda *overrides: run(configure(*overrides), ParallelContext.single())


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
            action(ParallelContext(torch.device("cpu"), rank, size, data=Group(size, rank, dist.group.WORLD)))

        run_world(size, member, folder)
        files = [folder / f"failure{rank}" for rank in range(size)]
        return [file.read_text() if file.exists() else "" for file in files]

    return ranks
