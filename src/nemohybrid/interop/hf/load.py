"""Hugging Face NemotronH folders -> our models, a layer at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemohybrid.config.model import ModelConfig
from nemohybrid.errors import CheckpointError
from nemohybrid.interop.hf.config_in import read_config
from nemohybrid.interop.hf.files import CONFIG, Stored, read_tensors, stored_tensors
from nemohybrid.interop.hf.names import DiskTensor, disk_tensors
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.init import allocate
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.symbols import parse_pattern

READABLE = ("F32", "BF16", "F16")
"""What fp32 parameters hold exactly. Eight bits need scales that such a folder keeps elsewhere."""
LISTED_PROBLEMS = 20
HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"


@torch.no_grad()
def load_hf(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mtp_depth: int | None = None,
) -> HybridModel:
    """The model in a NemotronH folder (`config.json`, `*.safetensors`), computing in `dtype`; parameters are fp32.

    mtp_depth: how many depths of multi-token prediction the model has, 0 to leave them out. None: what the folder says;
    one that was not exported here knows only the blocks it stores, a single one for a block that is trained at two
    depths. Nothing in the folder is executed. The host holds the model and the pages of one layer.
    Raises CheckpointError for a folder that is not one, a setting we do not have, and the first tensors that are
    missing, unexpected, misshapen or of a type we do not read; no memory is taken before all are known to fit.
    """
    folder = Path(folder)
    config = read_config(folder, dtype, mtp_depth)
    stored = stored_tensors(folder)
    if mtp_depth == 0:
        stored = {name: entry for name, entry in stored.items() if not name.startswith("mtp.")}
    model = _on_meta(config, stored, folder)
    wanted = disk_tensors(model)
    if config.tie_embeddings and HEAD not in stored:
        del wanted[HEAD]
    _check(folder, config, wanted, stored)
    allocate(model, device)
    for buffer in model.buffers():
        buffer.zero_()
    _fill(folder, wanted, stored, logical_parameters(model) | dict(model.named_buffers()))
    return model


def _on_meta(config: ModelConfig, stored: Mapping[str, Stored], folder: Path) -> HybridModel:
    """The model without memory. A folder of few tensors cannot make us count to a billion experts."""
    pattern = parse_pattern(config.pattern)
    experts = config.num_experts if "E" in pattern.main + pattern.mtp else 0
    if pattern.num_layers + experts > len(stored):
        needs = f"{pattern.num_layers} layers" + (f" of {experts} experts" if experts else "")
        raise CheckpointError(f"{folder / CONFIG} describes {needs}, but the folder has {len(stored)} tensors")
    try:
        with torch.device("meta"):
            return HybridModel(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # a size beyond any memory
        raise CheckpointError(f"{folder / CONFIG} describes a model that cannot be: {error}") from error


def _check(folder: Path, config: ModelConfig, wanted: Mapping[str, DiskTensor], stored: Mapping[str, Stored]) -> None:
    """CheckpointError unless the headers are those of the model, tensor by tensor."""
    problems = [f"missing tensor {name}" for name, tensor in wanted.items() if name not in stored and tensor.parts]
    for name, entry in stored.items():
        if name not in wanted:
            problems.append(f"unexpected tensor {name}")
        elif tuple(entry.shape) != wanted[name].shape:
            problems.append(f"{name} is {entry.shape}, the model needs {list(wanted[name].shape)}")
        elif entry.dtype not in READABLE:
            problems.append(f"{name} is {entry.dtype}. Legal: {', '.join(READABLE)}")
    if problems:
        listed = "\n  ".join(problems[:LISTED_PROBLEMS])
        raise CheckpointError(f"{folder} does not fit its own config.json:\n  {listed}{_mtp_hint(problems, config)}")


def _mtp_hint(problems: list[str], config: ModelConfig) -> str:
    """transformers drops MTP weights and keeps the field that counts them."""
    if not all(" mtp." in problem for problem in problems):
        return ""
    depth = parse_pattern(config.pattern).mtp_depth
    return f"\nThe field num_nextn_predict_layers stands for {depth}. An MTP depth of 0 reads the folder without these."


def _fill(
    folder: Path, wanted: Mapping[str, DiskTensor], stored: dict[str, Stored], values: Mapping[str, Tensor]
) -> None:
    """Copy every tensor of the folder into ours. `wanted` has the embedding before a head that is tied to it."""
    filled: set[str] = set()
    for name, tensor in read_tensors(stored, [name for name in wanted if name in stored]):
        disk = wanted[name]
        if filled.issuperset(disk.parts) and disk.expert is None:
            _check_known(folder, disk, tensor, values)
        else:
            disk.scatter(tensor, values)
            filled.update(disk.parts)


def _check_known(folder: Path, disk: DiskTensor, tensor: Tensor, values: Mapping[str, Tensor]) -> None:
    """A tensor whose values the model has already, or takes for zero, must have these."""
    known = disk.gather(values.__getitem__)
    if torch.equal(tensor.to(known), known):
        return
    if disk.name == HEAD:
        reason = "config.json says tie_word_embeddings, but it differs from the embedding. Set that to false"
    else:
        reason = "is not zero, and the settings say that the model does without it"
    raise CheckpointError(f"{folder}: {disk.name}: {reason}")
