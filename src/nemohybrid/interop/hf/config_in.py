"""`config.json` of a NemotronH folder -> our configuration of the model."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemohybrid.config.check import build
from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import ModelConfig
from nemohybrid.config.rules import violated_rules
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.section import leaves
from nemohybrid.config.violation import Violation
from nemohybrid.errors import CheckpointError, ConfigError
from nemohybrid.interop.hf.fields import (
    FIELDS,
    FIXED,
    MODEL_TYPE,
    MOST_PADDING,
    OF_THE_READER,
    OURS,
    SAID_TWICE,
    SYMBOL_OF_BLOCK,
    Field,
)
from nemohybrid.interop.hf.files import CONFIG, json_object
from nemohybrid.model.hybrid import DTYPES
from nemohybrid.pattern import Pattern
from nemohybrid.symbols import parse_pattern

MAX_BLOCKS = 64


def read_config(folder: Path, dtype: torch.dtype = torch.float32, mtp_depth: int | None = None) -> ModelConfig:
    """Our configuration for the `config.json` of a folder, computing in `dtype`.

    mtp_depth: as many depths of multi-token prediction, and none for 0; None: what the folder says.
    Raises CheckpointError for another kind of model, settings we do not have, and values that are none.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} not found: {folder} is not a Hugging Face model folder")
    if dtype not in DTYPES.values():
        raise CheckpointError(f"dtype={dtype} was asked for. Legal: {', '.join(map(str, DTYPES.values()))}")
    hf = json_object(path)
    try:
        return config_of(hf, folder.name, dtype, mtp_depth)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def config_of(hf: Mapping[str, Any], name: str, dtype: torch.dtype, mtp_depth: int | None = None) -> ModelConfig:
    """Our configuration for the content of a `config.json`."""
    _refuse_unsupported(hf)
    pattern, repeats = _pattern(hf)
    fields = [field for field in FIELDS if not field.symbols or field.symbols in pattern.main + pattern.mtp]
    values = {"name": name, "dtype": next(n for n, t in DTYPES.items() if t == dtype), "dt_limit": _dt_limit(hf)}
    values |= {field.ours: _value(field, hf) for field in fields}
    values |= {"pattern": pattern.canonical, "mtp.repeat_block": repeats}
    values |= _ours(hf, pattern, repeats, {field.ours for field in fields})
    if mtp_depth is not None:
        values["pattern"] = _with_depth(parse_pattern(values["pattern"]), values["mtp.repeat_block"], mtp_depth)
    return _checked(values)


def _checked(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration with every type, bound and rule checked; complaints name the fields of `config.json`."""
    violations: list[Violation] = []
    model = build(ModelConfig, _nested(values), violations)
    if not violations:
        derive_sizes(model)
        violations = violated_rules(RunConfig(model=model), model_only=True)
    if violations:
        theirs = {field.ours: field.theirs for field in FIELDS}
        raise CheckpointError("; ".join(str(_renamed(violation, theirs)).strip() for violation in violations))
    if not may_pad(model):
        raise CheckpointError(
            f"{OURS}.vocab_multiple={model.vocab_multiple} would pad {model.vocab_size} ids to as many rows. "
            f"Legal: up to {max(MOST_PADDING, model.vocab_size or 0)}"
        )
    model.freeze()
    return model


def may_pad(model: ModelConfig) -> bool:
    """Whether the padding of the vocabulary is small enough to be taken from a folder."""
    return model.vocab_multiple <= max(MOST_PADDING, model.vocab_size or 0)


def _renamed(violation: Violation, theirs: Mapping[str, str]) -> Violation:
    key, equals, value = violation.where.partition("=")
    ours = key.removeprefix("model.")
    return replace(violation, where=theirs.get(ours, ours) + equals + value, legal={})


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"router.groups": 1}` -> `{"router": {"groups": 1}}`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _value(field: Field, hf: Mapping[str, Any]) -> Any:
    found = next((hf[name] for name in (field.theirs, *field.aliases) if hf.get(name) is not None), field.default)
    return hf.get("num_attention_heads") if found is None and field.ours == "num_query_groups" else found


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    if hf.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"describes a {hf.get('model_type')!r} model; only {MODEL_TYPE} can be read")
    if hf.get("quantization_config") is not None:
        raise CheckpointError(
            "quantization_config: quantized weights cannot be read; take the folder they were made of"
        )
    wrong = [
        f"{name}={hf[name]}, only {only} can be read" for name, only in FIXED.items() if hf.get(name, only) != only
    ]
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _dt_limit(hf: Mapping[str, Any]) -> list[float] | None:
    """`[0.0, {"__float__": "Infinity"}]` is how transformers writes no limit."""
    given = hf.get("time_step_limit") or hf.get("mamba_dt_limit") or (0.0, math.inf)
    try:
        limit = [float(v["__float__"]) if isinstance(v, dict) else float(v) for v in given]
    except (TypeError, ValueError, KeyError):
        raise CheckpointError(f"time_step_limit={given} is not [low, high]") from None
    return None if limit == [0.0, math.inf] else limit


# --- layers ----------------------------------------------------------------------------------------------------------


def _pattern(hf: Mapping[str, Any]) -> tuple[Pattern, bool]:
    """The layers and MTP blocks that are stored, and whether one block stands for all depths."""
    main = _symbols(hf, "hybrid_override_pattern", "layers_block_type")
    if main is None:
        raise CheckpointError("names no layers. Give layers_block_type or hybrid_override_pattern")
    if hf.get("num_hidden_layers") not in (None, len(main)):
        raise CheckpointError(f"num_hidden_layers={hf['num_hidden_layers']}, but {main} has {len(main)} layers")
    stored = hf.get("num_nextn_predict_layers") or 0
    if type(stored) is not int or not 0 <= stored <= MAX_BLOCKS:
        raise CheckpointError(f"num_nextn_predict_layers={stored} is not a number of blocks. Legal: 0 to {MAX_BLOCKS}")
    block = (_symbols(hf, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or "*E") if stored else ""
    if set(main + block) - set(SYMBOL_OF_BLOCK.values()):
        raise CheckpointError(f"the pattern {'/'.join([main, *[block] * bool(block)])} has other layers than M * - E")
    return parse_pattern(main + f"/{block}" * stored), stored <= 1


def _symbols(hf: Mapping[str, Any], text: str, names: str) -> str | None:
    """The layers, from a text such as `ME*` or from a list of names; None where neither is there."""
    blocks, pattern = hf.get(names), hf.get(text)
    if not isinstance(pattern, str | None) or not isinstance(blocks, list | None):
        raise CheckpointError(f"{text} is not a text, or {names} not a list")
    unknown = [block for block in blocks or () if not isinstance(block, str) or block not in SYMBOL_OF_BLOCK]
    if unknown:
        raise CheckpointError(f"names unknown layers {unknown[:3]}. Legal in {names}: {', '.join(SYMBOL_OF_BLOCK)}")
    listed = "".join(SYMBOL_OF_BLOCK[block] for block in blocks or ())
    if pattern and listed and pattern != listed:
        raise CheckpointError(f"{text}={pattern} and {names}, which is {listed}, do not agree")
    return pattern or listed or None


def _ours(hf: Mapping[str, Any], pattern: Pattern, repeats: bool, said: set[str]) -> dict[str, Any]:
    """What an export of ours adds: settings for which there is no field. They must not contradict those that have one."""
    ours = hf.get(OURS) or {}
    if not isinstance(ours, dict):
        raise CheckpointError(f"{OURS} is not an object")
    known = {key for key, _, _ in leaves(ModelConfig())} - said - OF_THE_READER | SAID_TWICE
    if illegal := next((key for key in ours if key not in known), None):
        raise CheckpointError(f"{OURS}.{illegal}: no such setting, or one that has a field of its own")
    full = parse_pattern(str(ours.get("pattern", pattern.canonical)))
    repeats = bool(ours.get("mtp.repeat_block", repeats))
    stored = min(full.mtp_depth, 1) if repeats else full.mtp_depth
    if (full.main, full.mtp, stored) != (pattern.main, pattern.mtp, pattern.mtp_depth):
        raise CheckpointError(f"{OURS}.pattern={ours.get('pattern')} is not the layers of the other fields")
    return ours


def _with_depth(pattern: Pattern, repeats: bool, depth: int) -> str:
    """The pattern with another number of MTP depths."""
    legal = "any up to 64" if repeats and pattern.mtp else f"0 or {pattern.mtp_depth}" if pattern.mtp else "0"
    if depth not in (0, pattern.mtp_depth) and not (repeats and pattern.mtp and 0 < depth <= MAX_BLOCKS):
        raise CheckpointError(
            f"an MTP depth of {depth} was asked for, the folder has {pattern.mtp_depth}. Legal: {legal}"
        )
    return "|".join(pattern.segments) + f"/{pattern.mtp}" * depth
