"""Hugging Face NemotronH folders -> our models.

Disk names and field meanings are those of transformers 5.23 `nemotron_h` (save_pretrained) and of NVIDIA's hub repositories.
Its `time_step_min` is a floor that transformers applies in training and prefill but not when decoding; Megatron, the
hub configs' `time_step_limit` (0, inf) and we apply none.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import ModelConfig, RouterConfig
from nemohybrid.errors import CheckpointError
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.model.init import allocate
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.symbols import parse_pattern

SYMBOL_OF_BLOCK = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""Names in `layers_block_type`, old and new, -> our symbols."""


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> HybridModel:
    """The model in a NemotronH folder (`config.json`, `*.safetensors`), computing in `dtype`; parameters stay fp32.

    Raises CheckpointError for a folder that is not one, a field we do not support, and any missing, unexpected or misshapen
    tensor. MTP weights (`mtp.*`) are passed over.
    """
    folder = Path(folder)
    config = read_config(folder, dtype)
    with torch.device("meta"):
        model = HybridModel(config)
    allocate(model, device)
    _fill(folder, model)
    return model


def read_config(folder: Path, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """Our configuration for a NemotronH `config.json`."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} not found: {folder} is not a Hugging Face model folder")
    hf = _json_object(path)
    if hf.get("model_type") != "nemotron_h":
        raise CheckpointError(f"{path} describes a {hf.get('model_type')!r} model; only nemotron_h can be read")
    _refuse_unsupported(path, hf, dtype)
    config = ModelConfig(
        name=folder.name,
        pattern=_pattern(path, hf),
        dtype=next(name for name, value in DTYPES.items() if value == dtype),
        head_dim=hf.get("head_dim") or hf.get("attention_head_dim"),
        dt_limit=_dt_limit(hf),
        shared_expert_ffn_hidden_size=hf.get("moe_shared_expert_intermediate_size", 0),
        activation="squared_relu",
        router=_router(hf),
        **{ours: hf[theirs] for ours, theirs in _SAME_MEANING.items() if theirs in hf},
    )
    derive_sizes(config)
    config.freeze()
    return config


_SAME_MEANING = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "norm_epsilon": "layer_norm_epsilon",
    "init_std": "initializer_range",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "ssm_state_size": "ssm_state_size",
    "conv_kernel": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "chunk_size": "chunk_size",
    "ffn_hidden_size": "intermediate_size",
    "num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_latent_size": "moe_latent_size",
}
"""Our field -> theirs."""


def _router(hf: Mapping[str, Any]) -> RouterConfig:
    return RouterConfig(
        normalize=hf.get("norm_topk_prob", True),
        scaling_factor=hf.get("routed_scaling_factor", 1.0),
        groups=hf.get("n_group", 1),
        top_groups=hf.get("topk_group", 1),
    )


def _pattern(path: Path, hf: Mapping[str, Any]) -> str:
    if text := hf.get("hybrid_override_pattern"):
        return text
    blocks = hf.get("layers_block_type") or []
    unknown = [block for block in blocks if block not in SYMBOL_OF_BLOCK]
    if unknown or not blocks:
        fault = f"names unknown layers {unknown}" if blocks else "names no layers"
        raise CheckpointError(f"{path} {fault}. Legal in layers_block_type: {', '.join(SYMBOL_OF_BLOCK)}")
    return "".join(SYMBOL_OF_BLOCK[block] for block in blocks)


_FIXED = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
}
"""Fields that can be read with one value only. transformers switches biases by layer kind; we have one switch for all."""


def _refuse_unsupported(path: Path, hf: Mapping[str, Any], dtype: torch.dtype) -> None:
    wrong = [
        f"{field}={hf[field]}, only {only} can be read" for field, only in _FIXED.items() if hf.get(field, only) != only
    ]
    if hf.get("moe_latent_size"):
        wrong.append(f"moe_latent_size={hf['moe_latent_size']}, LatentMoE layers cannot be read yet")
    if dtype not in DTYPES.values():
        wrong.append(f"dtype={dtype} was asked for. Legal: {', '.join(map(str, DTYPES.values()))}")
    if wrong:
        raise CheckpointError(f"{path}: " + "; ".join(wrong))


def _dt_limit(hf: Mapping[str, Any]) -> list[float] | None:
    """`[0.0, {"__float__": "Infinity"}]` is how transformers writes no limit."""
    limit = [
        float(v["__float__"]) if isinstance(v, dict) else float(v) for v in hf.get("time_step_limit") or (0, math.inf)
    ]
    return None if limit == [0.0, math.inf] else limit


# --- names -----------------------------------------------------------------------------------------------------------

_MIXER_NAMES = {
    "M": {
        "in_proj.weight": ["in_proj.z", "in_proj.x", "in_proj.B", "in_proj.C", "in_proj.dt"],
        "conv1d.weight": ["conv.x", "conv.B", "conv.C"],
        "conv1d.bias": ["conv.x.bias", "conv.B.bias", "conv.C.bias"],
        "dt_bias": ["dt_bias"],
        "A_log": ["A_log"],
        "D": ["D"],
        "norm.weight": ["norm.weight"],
        "out_proj.weight": ["out_proj.weight"],
    },
    "*": {
        "q_proj.weight": ["qkv.q"],
        "k_proj.weight": ["qkv.k"],
        "v_proj.weight": ["qkv.v"],
        "o_proj.weight": ["out_proj.weight"],
    },
    "-": {"up_proj.weight": ["fc1.weight"], "down_proj.weight": ["fc2.weight"]},
    "E": {
        "gate.weight": ["router.gate.weight"],
        "gate.e_score_correction_bias": ["router.expert_bias"],
        "shared_experts.up_proj.weight": ["shared_expert.fc1.weight"],
        "shared_experts.down_proj.weight": ["shared_expert.fc2.weight"],
    },
}
"""Symbol -> disk name under `mixer.` -> logical tensors under `mixer.` that are stacked in it, in order."""


def disk_views(model: HybridModel) -> dict[str, list[Tensor]]:
    """Disk name -> views of our values that, joined along rows, are the tensor of that name."""
    ours = logical_parameters(model) | dict(model.named_buffers())
    names = {"backbone.embeddings.weight": ["embedding.weight"], "backbone.norm_f.weight": ["final_norm.weight"]}
    if not model.config.tie_embeddings:
        names["lm_head.weight"] = ["output.weight"]
    views: dict[str, list[Tensor]] = {}
    for number, symbol in enumerate(parse_pattern(model.config.pattern).main):
        disk, logical = f"backbone.layers.{number}.", f"layers.{number}."
        names[disk + "norm.weight"] = [logical + "norm.weight"]
        for theirs, parts in _MIXER_NAMES[symbol].items():
            names[f"{disk}mixer.{theirs}"] = [f"{logical}mixer.{part}" for part in parts]
        if symbol == "E":
            views |= _expert_views(disk + "mixer.experts.", ours, logical + "mixer.experts.")
    present = {disk: parts for disk, parts in names.items() if parts[0] in ours}  # no conv bias, no shared expert, ...
    return views | {disk: [ours[part] for part in parts] for disk, parts in present.items()}


def _expert_views(disk: str, ours: Mapping[str, Tensor], logical: str) -> dict[str, list[Tensor]]:
    """One tensor an expert on disk, all experts stacked in memory."""
    pairs = (("up_proj", ours[logical + "up"]), ("down_proj", ours[logical + "down"]))
    return {f"{disk}{j}.{name}.weight": [w] for name, stack in pairs for j, w in enumerate(stack)}


def _fill(folder: Path, model: HybridModel) -> None:
    """Copy every tensor of the folder into the model; strict both ways."""
    views, problems = disk_views(model), []
    for name, tensor in _disk_tensors(folder):
        parts = views.pop(name, None)
        if parts is None:
            problems.append(f"unexpected tensor {name}")
            continue
        needed = _disk_shape(name, parts)
        if list(tensor.shape) != needed:
            problems.append(f"{name} is {list(tensor.shape)}, the model needs {needed}")
            continue
        for part, rows in zip(parts, tensor.split([p.shape[0] for p in parts]), strict=True):
            part.copy_(rows.reshape(part.shape))
    problems += [f"missing tensor {name}" for name in views]
    if problems:
        raise CheckpointError(f"{folder} does not fit its own config.json:\n  " + "\n  ".join(problems[:20]))


def _disk_shape(name: str, parts: list[Tensor]) -> list[int]:
    """The parts stacked; the convolution has one input channel, [channels, 1, taps]."""
    one_channel = [1] if name.endswith("conv1d.weight") else []
    return [sum(p.shape[0] for p in parts), *one_channel, *parts[0].shape[1:]]


def _disk_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder but those of MTP blocks."""
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    if not name.startswith("mtp."):
                        yield name, content.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map: tensor name -> file")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} names a file outside its folder: {outside[0]!r}")
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder / missing[0]} not found")
    return [folder / name for name in names]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
