"""Files that hold arguments: shell scripts, MODEL_ARGS of Megatron-LM's functional tests, dumps of Megatron-Bridge."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.arguments import Arguments, Given, collect, name_of
from nemohybrid.interop.megatron.dump import read_dump
from nemohybrid.interop.megatron.script import read_script

LARGEST = 2_000_000
"""Bytes of a file; real ones have some thousands."""

DEFAULTS: dict[str, Any] = {
    "add_bias_linear": True,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "attention_dropout": 0.1,
    "clip_grad": 1.0,
    "hidden_dropout": 0.1,
    "init_method_std": 0.02,
    "lr_decay_style": "linear",
    "lr_wsd_decay_style": "exponential",
    "mamba_chunk_size": 128,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "min_lr": 0.0,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "mtp_loss_scaling_factor": 0.1,
    "norm_epsilon": 1e-5,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "weight_decay": 0.01,
}
"""What Megatron-LM takes where an argument list says nothing (megatron/training/arguments.py), as far as it matters here."""


class _Unique(yaml.SafeLoader):
    """Plain YAML, in which the same key twice is a fault."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None) or key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} again", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_arguments(path: Path) -> Arguments:
    """The arguments in a file: .json, .yaml or .yml by their structure, everything else as a shell script.

    Raises ConfigError for files that cannot be read, with the line where there is one.
    """
    text = _text(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        return read_script(text, DEFAULTS)
    values = _json(text, path) if path.suffix == ".json" else _yaml(text, path)
    values = values.get("MODEL_ARGS", values) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: holds no arguments: neither MODEL_ARGS, nor --flag: value, nor sections of a dump")
    if all(str(key).startswith("-") for key in values):
        return collect(_flags(values), DEFAULTS)
    return read_dump(values)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: is larger than {LARGEST:,} bytes, no argument list")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text (UTF-8)") from None


def _yaml(text: str, path: Path) -> Any:
    try:
        return _Unique(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read as plain YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


def _json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{path}: has the key {twice[0]!r} twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: is no JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


def _flags(values: dict[str, Any]) -> Iterator[Given]:
    """`--flag: value`; lists are also written as text in brackets."""
    for shown, value in values.items():
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = value[1:-1].split()
            value = value[0] if len(value) == 1 else value
        yield Given(name_of(shown), shown, value)
