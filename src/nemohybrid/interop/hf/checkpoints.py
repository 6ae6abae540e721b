"""Hugging Face folders <-> checkpoints of ours."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from nemohybrid.checkpoint.files import explained
from nemohybrid.checkpoint.folders import find_checkpoints
from nemohybrid.checkpoint.load import load_checkpoint
from nemohybrid.checkpoint.save import save_checkpoint
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.yaml import config_yaml, read_config_yaml
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.data.tokenizer_base import MODEL_FILE, TOKENIZER_FILE, Tokenizer
from nemohybrid.errors import CheckpointError, DataError
from nemohybrid.interop.hf.files import CONFIG, json_object
from nemohybrid.interop.hf.load import load_hf
from nemohybrid.interop.hf.names import disk_tensors
from nemohybrid.interop.hf.save import SHARD_BYTES, Format, write_folder
from nemohybrid.interop.hf.special_ids import ids_file, read_ids, special_ids
from nemohybrid.interop.hf.tokenizer_files import read_tokenizer
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.parallel.layout import logical_parameters


def import_checkpoint(
    folder: Path, output: Path, mtp_depth: int | None = None, eod_token: str | None = None
) -> tuple[Path, Tokenizer | None]:
    """Make `output/checkpoints/step_00000000` from a NemotronH folder: weights, configuration, tokenizer, no optimizer.

    It computes in the dtype that is the default for training, whatever the folder is stored in; the weights are fp32.
    Returns the checkpoint, and the tokenizer where the folder has one. Raises CheckpointError like `load_hf`, and for an
    `output` that has checkpoints; DataError for a tokenizer that we cannot use.
    """
    root = output / "checkpoints"
    if existing := find_checkpoints(root):
        raise CheckpointError(f"{existing[0]} is there already; nothing is overwritten. Give another output")
    tokenizer = read_tokenizer(folder, eod_token)
    model = load_hf(folder, DTYPES[ModelConfig().dtype], mtp_depth=mtp_depth)
    rows = model.config.vocab_size or 0
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise DataError(f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model {rows}")
    tensors = {f"model.{name}": value for name, value in _values(model).items()}
    state = {"step": 0, "fixed": {}}
    with TemporaryDirectory() as scratch:
        if tokenizer is not None:
            tokenizer.save(scratch)
        extra = {file.name: file for file in Path(scratch).iterdir()}
        extra |= ids_file(special_ids(json_object(folder / CONFIG)))
        config = config_yaml(RunConfig(model=model.config))
        return save_checkpoint(root, 0, tensors, state, {"config.yaml": config, **extra}), tokenizer


@torch.no_grad()
def export_checkpoint(
    checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32, max_shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the model of a checkpoint folder as a NemotronH folder, one logical tensor in memory at a time.

    The hashes of the checkpoint are not checked here: `generate.load.find_checkpoint` or `checkpoint.verify` does that.
    Raises CheckpointError for a damaged checkpoint, and as `save_hf` does.
    """
    with explained(f"reading {checkpoint}"):
        config = read_config_yaml(checkpoint / "config.yaml")
    with torch.device("meta"):
        model = HybridModel(config.model)
    names = {name for tensor in disk_tensors(model).values() for name in tensor.parts}
    shapes = {name: value for name, value in _values(model).items() if name in names}
    form = Format(dtype, max_shard_bytes, config.data.sequence_length, read_ids(checkpoint))
    return write_folder(folder, model, CheckpointValues(checkpoint, shapes), form, _tokenizer_of(checkpoint))


class CheckpointValues:
    """Logical name -> values, read from a checkpoint when asked for. Only the last ones are held."""

    def __init__(self, checkpoint: Path, shapes: Mapping[str, Tensor]) -> None:
        self.checkpoint, self.shapes = checkpoint, shapes
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Raises CheckpointError where the checkpoint lacks the tensor, or has another shape."""
        if name not in self.held:
            self.held = {}  # before the next one needs memory
            value = torch.empty_like(self.shapes[name], device="cpu")
            everything_else = ("",)
            load_checkpoint(
                self.checkpoint, {f"model.{name}": value}, allow_unexpected=everything_else, verify_files=False
            )
            self.held = {name: value}
        return self.held[name]


def _values(model: HybridModel) -> dict[str, Tensor]:
    return logical_parameters(model) | {name: buffer.detach() for name, buffer in model.named_buffers()}


def _tokenizer_of(checkpoint: Path) -> Tokenizer | None:
    """None for an import from a folder that had none."""
    there = any((checkpoint / name).is_file() for name in (TOKENIZER_FILE, MODEL_FILE))
    return load_tokenizer(checkpoint) if there else None
