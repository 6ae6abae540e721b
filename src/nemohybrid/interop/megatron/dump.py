"""Dumps of Megatron-Bridge recipes: nested dataclasses, whose fields are named like the arguments with few exceptions."""

from collections.abc import Iterator
from typing import Any

from nemohybrid.errors import ConfigError
from nemohybrid.interop.megatron.arguments import CONTRADICTION, Arguments, Given

RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "num_moe_experts": "num_experts",
    "sequence_length": "seq_length",
    "wd": "weight_decay",
    "blend": "data_path",
}
"""Field -> argument, where they differ."""

OPPOSITE = {"share_embeddings_and_output_weights": "untie_embeddings_and_output_weights"}
"""Field -> the argument that says the contrary."""

ACTIVATIONS = {"squared_relu": "squared_relu", "silu": "swiglu", "swish": "swiglu"}

TRANSLATED = (
    "model",
    "dataset",
    "train",
    "validation",
    "optimizer",
    "scheduler",
    "rng",
    "tokenizer",
    "checkpoint",
    "logger",
)
"""Sections whose fields are looked at one by one; where two have the same field, the last of these counts."""

MOST_FIELDS = 20_000


def read_dump(values: dict[str, Any]) -> Arguments:
    """Arguments of a nested dump; a flat one is all `model`. Defaults are not added: a dump has every field.

    Raises ConfigError for more than MOST_FIELDS fields.
    """
    arguments = Arguments({}, {})
    fields = list(_fields(values))
    fields.sort(key=lambda field: _rank(field[0]))
    for path, value in fields:
        one = _as_argument(path, value)
        before = arguments.given.get(one.name)
        if before and before.value is not None and one.value is not None and before.value != one.value:
            arguments.remark(CONTRADICTION, before.text, f"differs from {one.text}, which counts")
        if before is None or one.value is not None:
            arguments.given[one.name] = one
    return arguments


def _rank(path: tuple[str, ...]) -> int:
    return TRANSLATED.index(path[0]) if path[0] in TRANSLATED and len(path) > 1 else -1


def _fields(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of everything that is no section. Functions, dtypes and enums are dumped as {_target_: name, ...}."""
    stack: list[tuple[tuple[str, ...], Any]] = [(path, values)]
    count = 0
    while stack:
        path, value = stack.pop()
        count += 1
        if count > MOST_FIELDS:
            raise ConfigError(f"a dump of more than {MOST_FIELDS:,} fields: that is no recipe")
        if isinstance(value, dict) and "_target_" in value and not _is_section(value):
            yield path, str(value.get("_name_", value["_target_"])).rpartition(".")[2]
        elif isinstance(value, dict) and len(path) < 2:
            inner = [((*path, str(key)), inner) for key, inner in value.items() if str(key) != "_target_"]
            stack += reversed(inner)
        elif path:
            yield path, value


def _is_section(value: dict[str, Any]) -> bool:
    """A dataclass has fields that do not begin with an underscore."""
    return any(not str(key).startswith("_") for key in value)


def _as_argument(path: tuple[str, ...], value: Any) -> Given:
    """One field; those of sections that are not translated keep the section in their name."""
    section, field = path if len(path) == 2 else ("model", path[0])
    shown = ".".join(path)
    if section == "mixed_precision" or path == ("mixed_precision",):
        return Given(f"mixed_precision.{path[-1]}", shown, value)
    if section not in TRANSLATED:
        return Given(shown, shown, value)
    if field in OPPOSITE and isinstance(value, bool):
        return Given(OPPOSITE[field], shown, not value)
    if field == "activation_func" and isinstance(value, str):
        return Given(ACTIVATIONS.get(value, "activation_func"), shown, True if value in ACTIVATIONS else value)
    return Given(RENAMED.get(field, field), shown, value)
