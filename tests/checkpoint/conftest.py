"""Small checkpoints, forked children, and forked Gloo worlds for the checkpoint tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.tensor
from forked import fork, run_world, wait

from nemohybrid.checkpoint import save_checkpoint


def small_tensors(version: int) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and shapes, all telling which version of a run they belong to."""
    return {
        "model.weight": torch.full((6, 4), float(version)),
        "model.norm": torch.full((3,), float(version), dtype=torch.bfloat16),
        "optimizer.step": torch.tensor(version),
    }


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
        failures = run_world(size, action, tmp_path_factory.mktemp("world"))
        assert not failures, f"{failures[0].name}:\n{failures[0].read_text()}"

    return run


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A root with sound checkpoints of steps 10 and 20 (versions 1 and 2); copy it, do not change it."""
    root = tmp_path_factory.mktemp("template")
    for version, step in enumerate((10, 20), start=1):
        extra = {"config.yaml": "model: tiny\n", "tokenizer.json": b"{}"}
        save_checkpoint(root, step, small_tensors(version), {"version": version}, extra)
    return root
