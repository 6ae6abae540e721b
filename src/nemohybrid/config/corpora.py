"""What may stand in `data.train`, `data.valid` and `data.lengths`: text, or a mapping. OmegaConf has no type for that, so it is
checked here."""

import math
import re
from collections.abc import Mapping
from typing import Any

SET_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def weights_problem(value: Any) -> str:
    """Why `value` is neither empty, nor a prefix, nor a mapping of prefixes to weights; an empty string when it is."""
    if not isinstance(value, Mapping):
        return _prefix_problem(value, "a prefix, or {prefix: weight, ...}")
    faults = [f"the prefix {prefix!r} is no text" for prefix in value if not _is_prefix(prefix)]
    faults += [
        f"the weight of {prefix} is {weight!r}, not a number above 0"
        for prefix, weight in value.items()
        if not _is_weight(weight)
    ]
    return "; ".join(faults) if value else "names no corpus"


def names_problem(value: Any) -> str:
    """Why `value` is neither empty, nor a prefix, nor a mapping of names to prefixes; an empty string when it is."""
    if not isinstance(value, Mapping):
        return _prefix_problem(value, "a prefix, or {name: prefix, ...}")
    faults = [
        f"the name {name!r} is not made of letters, digits, _, - and ."
        for name in value
        if not (isinstance(name, str) and SET_NAME.fullmatch(name))
    ]
    faults += [f"{name} is {prefix!r}, not a prefix" for name, prefix in value.items() if not _is_prefix(prefix)]
    return "; ".join(faults) if value else "names no corpus"


def lengths_problem(value: Any) -> str:
    """Why `value` is no mapping of lengths to shares; an empty string when it is one, or is empty (null)."""
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return "is no mapping {tokens: share of the steps, ...}"
    faults = [f"the length {key!r} is no whole number above 0" for key in value if not _is_length(key)]
    faults += [
        f"the share of {key} is {share!r}, not a number above 0"
        for key, share in value.items()
        if not _is_weight(share)
    ]
    return "; ".join(faults)


def _prefix_problem(value: Any, wanted: str) -> str:
    return "" if value is None or _is_prefix(value) else f"is neither {wanted} nor empty (null)"


def _is_prefix(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
