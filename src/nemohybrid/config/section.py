"""What every configuration section is made of: fields with bounds, and a lock.

A section is a plain dataclass, because Hydra must be able to write into it while it composes; once all checks have passed the
same object is frozen and can be handed around without anyone changing it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    problem: Callable[[Any], str] | None = None,
) -> Any:
    """A dataclass field with a default, one line of help, and the values it may take.

    problem: for a field of type Any, why a value cannot stand in it, or an empty string.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "problem": problem}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base of the sections of `RunConfig`; assigning to a frozen one raises `dataclasses.FrozenInstanceError`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen"):
            raise dataclasses.FrozenInstanceError(
                f"{type(self).__name__}.{name} cannot be changed: the configuration is frozen"
            )
        object.__setattr__(self, name, value)

    def freeze(self) -> None:
        """Lock this section and those inside it; lists become tuples, mappings read-only."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, Section):
                value.freeze()
            elif isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(value, dict):
                object.__setattr__(self, field.name, MappingProxyType(dict(value)))
        object.__setattr__(self, "_frozen", True)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for saving."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.as_dict()
    return dict(value) if isinstance(value, Mapping) else value


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every `(dotted path, dataclass field, value)` below a section or section class instance."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value
