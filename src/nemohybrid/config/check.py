"""From composed plain values to a typed `RunConfig`: unknown keys, wrong types and values out of bounds, all at once.

OmegaConf alone lets `+model.hiden_size=1` through and drops it silently; nothing unknown gets past this file.
"""

import dataclasses
import math
import types
import typing
from functools import cache
from typing import Any

from nemohybrid.config.section import Section, leaves
from nemohybrid.config.violation import Violation
from nemohybrid.errors import did_you_mean, nearest


def field_types(section: type) -> dict[str, Any]:
    """Name -> resolved annotation of a section class."""
    return typing.get_type_hints(section)


def find_field(section: type, path: str) -> tuple[dataclasses.Field | None, Any, str]:
    """The `(field, annotation, complaint)` of a dotted path; the complaint is empty when the path exists."""
    annotation: Any = section
    entry = None
    walked: list[str] = []
    for name in path.split("."):
        if not is_section(annotation):
            return None, None, f"{'.'.join(walked)} has nothing inside"
        names = {f.name: f for f in dataclasses.fields(annotation)}
        if name not in names:
            return None, None, f"unknown key {name!r}" + _suggest(name, ".".join(walked), names)
        entry, annotation = names[name], field_types(annotation)[name]
        walked.append(name)
    return entry, annotation, ""


def _suggest(name: str, parent: str, names: dict[str, Any]) -> str:
    """The nearest key in the same section; else the key of that name, or nearly, in another section; else all keys here."""
    prefix = f"{parent}." if parent else ""
    close = [prefix + n for n in nearest(name, names)]
    if not close:
        elsewhere = all_keys()
        close = [path for near in nearest(name, elsewhere) for path in elsewhere[near]]
    if close:
        return f". Did you mean {' or '.join(map(repr, close[:3]))}?"
    return f". Keys here: {', '.join(sorted(names))}"


@cache
def all_keys() -> dict[str, list[str]]:
    """Last word of every key of a run -> the dotted keys that end in it."""
    from nemohybrid.config.run_config import RunConfig

    result: dict[str, list[str]] = {}
    for path, field, _ in leaves(RunConfig()):
        result.setdefault(field.name, []).append(path)
    return result


def is_section(annotation: Any) -> bool:
    """Whether values of this type hold further keys."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def value_problem(field: dataclasses.Field, annotation: Any, value: Any) -> str:
    """Why `value` cannot stand in this field, or an empty string."""
    if problem := field.metadata.get("problem"):
        return problem(value)
    if not _fits(value, annotation):
        return f"is not {_type_name(annotation)}"
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        return f"is no choice{did_you_mean(str(value), choices) or '.'} Choices: {', '.join(choices)}"
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    if low is not None and value < low:
        return f"must be at least {low}"
    if high is not None and value > high:
        return f"must be at most {high}"
    return ""


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); any other type alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    return any(_fits_one(value, kind) for kind in alternatives(annotation))


def _fits_one(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return isinstance(value, list | tuple) and all(_fits_one(v, inner) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _type_name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "empty (null)"}
    names |= {list[float]: "a list of numbers", list[str]: "a list of texts"}
    return " or ".join(names[kind] for kind in alternatives(annotation))


def build(section: type, values: dict[str, Any], violations: list[Violation], prefix: str = "") -> Any:
    """An instance of `section` filled from nested `values`; everything that does not fit is appended to `violations`."""
    fields = {f.name: f for f in dataclasses.fields(section)}
    hints = field_types(section)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{prefix}{name}"
        if name not in fields:
            violations.append(Violation(where, f"unknown key {name!r}" + _suggest(name, prefix.rstrip("."), fields)))
        elif is_section(hints[name]):
            if isinstance(value, dict):
                arguments[name] = build(hints[name], value, violations, f"{where}.")
            else:
                violations.append(Violation(f"{where}={value}", "is a section, not a value"))
        elif problem := value_problem(fields[name], hints[name], value):
            violations.append(Violation(f"{where}={value}", problem))
        else:
            arguments[name] = float(value) if hints[name] is float else value
    return section(**arguments)
