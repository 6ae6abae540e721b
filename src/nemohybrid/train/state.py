"""What a run is made of, as checkpoints hold it: logical tensors, and a few numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.layout import Parts, logical_parts
from nemohybrid.train.optimizer import optimizer_tensors


def model_tensors(model: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> dict[str, Tensor | Parts]:
    """`model.<logical name>` -> what this rank holds, for every parameter and buffer.

    parameters: by name, what this rank trains; None: those of the model.
    """
    held: dict[str, Tensor | Parts] = {}
    for name, tensor in (parameters or dict(model.named_parameters())).items():
        held |= logical_parts(name, tensor, tensor.detach())
    held |= {name: buffer.detach() for name, buffer in model.named_buffers()}
    return {f"model.{name}": tensor for name, tensor in held.items()}


def run_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter] | None = None
) -> dict[str, Tensor | Parts]:
    """Model and optimizer, ready to be saved or filled in place."""
    named = parameters or dict(model.named_parameters())
    return model_tensors(model, named) | optimizer_tensors(optimizer, named)


def run_state(step: int, fixed: dict[str, Any], layout: dict[str, int]) -> dict[str, Any]:
    """The JSON side: where the run is, the settings that a resumed run must not change, and how ranks shared it."""
    return {"step": step, "fixed": fixed, "layout": layout}


FIXED = ("run.seed", "data.sequence_length", "data.reset_documents", "train.global_batch", "train.batch_ramp", "model")
"""Changing one of these in the middle would change what the same step means."""
FREE_IN_MODEL = (
    "name",
    "dtype",
    "chunk_size",
    "router.bias_update_rate",
    "router.aux_loss",
    "router.z_loss_weight",
    "mtp.loss_weight",
)
"""Beginnings of keys of `model` that do not change the parameters or what they mean; some say how it is trained."""


def fixed_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what must stay the same over the life of a run."""
    flat = dict(_flatten(config))
    free = tuple(f"model.{key}" for key in FREE_IN_MODEL)
    chosen = {k: v for k, v in flat.items() if k.startswith(FIXED) and not k.startswith(free)}
    return _uncut({key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()})


def _uncut(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the "|" of the pattern, which say who holds a layer and not what it is."""
    pattern = settings.get("model.pattern")
    return settings | {"model.pattern": pattern.replace("|", "")} if isinstance(pattern, str) else settings


def changed_settings(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the fixed settings of a checkpoint and those of this run: `key: then -> now`, a line each.

    A checkpoint of an older version lacks keys that are recorded now. One of `data` may then be anything; what a new option
    does by default is what that version did.
    """
    then, now = _uncut(then), _uncut(now)
    unknown = {key for key in now.keys() - then.keys() if key.startswith("data.")}
    then = {key: value for key, value in fixed_settings(RunConfig().as_dict()).items() if key in now} | then
    return [line for key in sorted({*then, *now} - unknown) for line in _changes(key, then.get(key), now.get(key))]


def _changes(key: str, then: Any, now: Any) -> Iterator[str]:
    """The innermost differences of two JSON values: `data.corpora[1].tokens: 200 -> 300`."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*then, *now]):
            yield from _changes(f"{key}.{name}", then.get(name), now.get(name))
    elif isinstance(then, list) and isinstance(now, list) and _is_table(then + now):
        for row in range(max(len(then), len(now))):
            yield from _changes(f"{key}[{row}]", *(rows[row] if row < len(rows) else None for rows in (then, now)))
    elif then != now:
        yield f"{key}: {then} -> {now}"


def _is_table(rows: list[Any]) -> bool:
    """Whether differences are told row by row; a list of numbers is one value."""
    return all(isinstance(row, dict) for row in rows)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
