"""One thing that is wrong with a configuration, and how a list of them is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemohybrid.errors import ConfigError


@dataclass(frozen=True)
class Violation:
    """`where` is the dotted key and its value; `legal` maps keys to the values that would be right."""

    where: str
    message: str
    legal: Mapping[str, Sequence[Any] | str] = field(default_factory=dict)

    def __str__(self) -> str:
        first, *rest = self.message.split("\n")
        hints = [f" Legal: {key}={_values(values)}" for key, values in self.legal.items()]
        head = f"  {self.where}: {first}" + ("." if hints and not first.endswith((".", "?")) else "") + ";".join(hints)
        return "\n".join([head, *(f"    {line}" for line in rest)])


def _values(values: Sequence[Any] | str) -> str:
    return values if isinstance(values, str) else ", ".join(map(str, values))


def raise_all(violations: Sequence[Violation]) -> None:
    """Raise one `ConfigError` that names every violation, or return when there is none."""
    if not violations:
        return
    count = len(violations)
    header = f"{count} problem{'s' if count > 1 else ''} in this configuration:"
    raise ConfigError("\n".join([header, *map(str, violations)]))
