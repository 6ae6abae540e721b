"""A model and its tokenizer from a checkpoint or a run folder."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from nemohybrid.checkpoint.load import load_checkpoint, newest_complete
from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.yaml import read_config_yaml
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer
from nemohybrid.errors import CheckpointError
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.model.init import allocate
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.precision.binding import PREFIX


def find_checkpoint(path: Path) -> Path:
    """`path` itself when it is a checkpoint; the newest sound one when it is a run folder. Raises CheckpointError."""
    if (path / "manifest.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (newest := newest_complete(folder)):
            for damaged, reason in newest.skipped:
                print(f"damaged checkpoint {damaged}: {reason}", file=sys.stderr)
            return newest.path
    raise CheckpointError(
        f"{path} is neither a checkpoint nor a run folder with one. Expected {path}/checkpoints/step_*"
    )


def load_for_inference(
    path: Path, device: torch.device | str, dtype: str | None = None
) -> tuple[HybridModel, Tokenizer]:
    """The model of a checkpoint in evaluation mode, computing in `dtype` (None: as it was trained)."""
    checkpoint = find_checkpoint(path)
    config = read_config_yaml(checkpoint / "config.yaml").model
    if dtype is not None:
        config = replace(config, dtype=dtype)
        config.freeze()
    with torch.device("meta"):
        model = HybridModel(config, ParallelContext.single(device))
    allocate(model, device)
    bind_kernels(model, KernelsSection(), torch.device(device), DTYPES[config.dtype], packed=False)
    model.eval().requires_grad_(False)
    tensors = logical_parameters(model) | dict(model.named_buffers())
    load_checkpoint(
        checkpoint,
        {f"model.{name}": tensor for name, tensor in tensors.items()},
        allow_unexpected=("optimizer.", "random.", PREFIX),
    )
    return model, load_tokenizer(checkpoint)
