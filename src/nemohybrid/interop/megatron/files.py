"""Files that hold arguments: shell scripts, MODEL_ARGS of Megatron-LM's functional tests, dumps of Megatron-Bridge."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.arguments import Arguments, Given, collect, name_of
from nemohybrid.interop.megatron.dump import read_dump
from nemohybrid.interop.megatron.script import read_script

LARGEST = 500_000
"""Bytes of a file, and characters of YAML with its aliases written out; real ones have some thousands."""

LONGEST_NUMBER = 1000
"""Characters of a whole number in YAML."""

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


class _Plain(yaml.SafeLoader):
    """YAML in which the same key twice is a fault, dates are text, and aliases cannot multiply what is in the file.

    Aliases themselves are needed: dumps name a dtype that occurs again by one.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.size, self.sizes = 0, dict[yaml.Node, int]()  # in characters, of all so far and of each node

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark, alias, before = self.peek_event().start_mark, self.check_event(yaml.AliasEvent), self.size
        node = super().compose_node(parent, index)
        if alias and node not in self.sizes:
            raise ComposerError(None, None, "an alias inside what it stands for", mark)
        if node is not None:
            self.size += self.sizes[node] if alias else 1 + len(node.value) * isinstance(node, yaml.ScalarNode)
            self.sizes.setdefault(node, self.size - before)
        if self.size > LARGEST:
            raise ComposerError(None, None, f"aliases make it longer than {LARGEST:,} characters", mark)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > LONGEST_NUMBER:
            reason = f"a number of {len(node.value)} characters"
            raise ConstructorError(None, None, reason, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None) or key in seen:
                raise ConstructorError(None, None, f"the key {key!r} again", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Plain.add_constructor("tag:yaml.org,2002:int", _Plain.construct_yaml_int)
_Plain.add_constructor("tag:yaml.org,2002:timestamp", _Plain.construct_yaml_str)


def read_arguments(path: Path) -> Arguments:
    """The arguments in a file: .json, .yaml or .yml by their structure, everything else as a shell script.

    Raises ConfigError for files that cannot be read, with the line where there is one, and for those without arguments.
    """
    text = _text(path)
    try:
        arguments = (
            _structured(text, path) if path.suffix in (".json", ".yaml", ".yml") else read_script(text, DEFAULTS)
        )
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None
    if not arguments.given:
        raise ConfigError(
            f"{path}: holds no arguments: neither --flag VALUE in a script, nor MODEL_ARGS or --flag: value in YAML, "
            "nor sections of a dump"
        )
    return arguments


def read_yaml(path: Path) -> Any:
    """Plain values. Raises ConfigError as `read_arguments` does."""
    return _yaml(_text(path), path)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"{path}: is larger than {LARGEST:,} bytes, no argument list")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text (UTF-8)") from None


def _structured(text: str, path: Path) -> Arguments:
    """By the keys: MODEL_ARGS or flags are an argument list, everything else is a dump."""
    values = _json(text, path) if path.suffix == ".json" else _yaml(text, path)
    values = values.get("MODEL_ARGS", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        return Arguments({}, {})
    if all(str(key).startswith("-") for key in values):
        return collect(_flags(values), DEFAULTS)
    return read_dump(values)


def _yaml(text: str, path: Path) -> Any:
    try:
        return _Plain(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # `!!int x` is a ValueError
        raise ConfigError(f"{path}: cannot be read as plain YAML: {' '.join(str(error).split())}") from None


def _json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ConfigError(f"{path}: has the key {name!r} twice")
            values[name] = value
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise ConfigError(f"{path}: is no JSON: {error}") from None


def _flags(values: dict[str, Any]) -> Iterator[Given]:
    """`--flag: value`; lists are also written as text in brackets."""
    for shown, value in values.items():
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = value[1:-1].split()
            value = value[0] if len(value) == 1 else value
        yield Given(name_of(shown), shown, value)
