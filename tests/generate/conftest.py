"""A run folder such as training leaves behind."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemohybrid.checkpoint import save_checkpoint
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml
from nemohybrid.data.tokenizer import ByteTokenizer
from nemohybrid.model import HybridModel
from nemohybrid.parallel.layout import logical_parameters


def _save_run(model: HybridModel, folder: Path) -> Path:
    """One checkpoint of `model`, with the byte tokenizer."""
    tensors = logical_parameters(model) | dict(model.named_buffers())
    ByteTokenizer().save(folder)
    config = RunConfig(model=dataclasses.replace(model.config))
    extra = {"config.yaml": config_yaml(config), "tokenizer.json": folder / "tokenizer.json"}
    saved = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"optimizer.step": torch.tensor(3)}
    save_checkpoint(folder / "checkpoints", 3, saved, {"step": 3}, extra)
    return folder


@pytest.fixture(scope="session")
def save_run() -> Callable[[HybridModel, Path], Path]:
    return _save_run
