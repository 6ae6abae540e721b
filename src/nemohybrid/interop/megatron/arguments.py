"""Arguments as Megatron-LM knows them, from whatever file they come, and what has to be said about them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CONTRADICTION = "Contradictions in the file"
TO_GIVE = "To be given"
NO_COUNTERPART = "No counterpart here"
UNKNOWN = "Unknown"
NOT_NEEDED = "Not needed"
DEFAULT = "Not in the file: defaults of Megatron-LM"
KINDS = (CONTRADICTION, TO_GIVE, NO_COUNTERPART, UNKNOWN, NOT_NEEDED, DEFAULT)
"""What a remark can be, the most pressing first."""


@dataclass(frozen=True)
class Given:
    """One argument: `name` as argparse calls it (hidden_size), `shown` as the user wrote it, `where` in the file.

    value: True or False for a switch, else text, a number, a list or a mapping.
    """

    name: str
    shown: str
    value: Any
    where: str = ""

    @property
    def text(self) -> str:
        """For people: `--lr 1e-3`, `optimizer.lr=1e-3`."""
        if self.value is True:
            return self.shown
        value = " ".join(map(str, self.value)) if isinstance(self.value, list) else str(self.value)
        value = value if len(value) <= 60 else value[:57] + "..."
        return f"{self.shown} {value}" if self.shown.startswith("-") else f"{self.shown}={value}"


@dataclass(frozen=True)
class Remark:
    """`subject`, an argument or one of our keys, and why something is said about it."""

    kind: str
    subject: str
    reason: str


def name_of(flag: str) -> str:
    """`--hidden-size` -> `hidden_size`."""
    return flag.lstrip("-").replace("-", "_")


def _finite(value: Any) -> float | None:
    """The number that a value is or spells; None when it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if isinstance(value, str) else value
        return number if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def texts(value: Any) -> Iterator[str]:
    """Every text of a value, those inside lists and mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(inner)


def is_open(value: Any) -> bool:
    """Whether a value, or one inside it, depends on a variable that the file does not set."""
    return any("$" in text or "`" in text for text in texts(value))


@dataclass
class Arguments:
    """All arguments of one program. Taking one marks it as dealt with; `remark` collects what has to be said."""

    given: dict[str, Given]
    defaults: Mapping[str, Any]
    said: dict[Remark, None] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @property
    def remarks(self) -> list[Remark]:
        """What has been said, in order."""
        return list(self.said)

    def has(self, name: str) -> bool:
        """Whether the file gives it, and not as empty."""
        return name in self.given and self.given[name].value is not None

    def shown(self, name: str) -> str:
        """How the file spells an argument; the flag of Megatron-LM where it does not have it."""
        return self.given[name].shown if name in self.given else "--" + name.replace("_", "-")

    def remark(self, kind: str, subject: str, reason: str) -> None:
        """Say something, once."""
        self.said.setdefault(Remark(kind, subject, reason))

    def take(self, name: str) -> Any:
        """The value as it stands in the file; else Megatron-LM's default; else None."""
        self.taken.add(name)
        return self.given[name].value if self.has(name) else self.defaults.get(name)

    def flag(self, name: str) -> bool:
        """Whether a switch is on."""
        value = self.take(name)
        return value is True or is_open(value) or str(value).lower() in ("true", "1")

    def word(self, name: str) -> str | None:
        """One word, such as the name of a style."""
        value = self.take(name)
        return None if value is None or isinstance(value, bool) or self._refuse_open(name, value) else str(value)

    def whole(self, name: str) -> int | None:
        """A whole number, also one written 1e6 or 1_000."""
        value = self.number(name)
        if value is None or value == int(value):
            return None if value is None else int(value)
        self._not_understood(name, "a whole number")
        return None

    def number(self, name: str) -> float | None:
        """A finite number; None where there is none, or where it depends on a variable."""
        value = self.take(name)
        if value is None or self._refuse_open(name, value):
            return None
        number = _finite(value)
        if number is None:
            self._not_understood(name, "a number")
        return number

    def numbers(self, name: str) -> list[float]:
        """The numbers of an argument that takes several, also separated by commas; [] where they cannot be known."""
        words = ",".join(self.words(name)).split(",")
        numbers = [_finite(word) for word in words if word.strip()]
        if None in numbers:
            self._not_understood(name, "a list of numbers")
        return [] if None in numbers else [number for number in numbers if number is not None]

    def words(self, name: str) -> list[str]:
        """The values of an argument that takes several; [] where there is none, or where one depends on a variable."""
        value = self.take(name)
        values = value if isinstance(value, list) else [] if value is None or isinstance(value, bool) else [value]
        return [] if any(self._refuse_open(name, v) for v in values) else [str(v) for v in values]

    def _refuse_open(self, name: str, value: Any) -> bool:
        if is_open(value):
            self.remark(TO_GIVE, self.given[name].text, "the file does not say what the variable is")
        return is_open(value)

    def _not_understood(self, name: str, wanted: str) -> None:
        self.remark(CONTRADICTION, self.given[name].text, f"is not {wanted}")


def collect(given: Iterable[Given], defaults: Mapping[str, Any]) -> Arguments:
    """The last of each name counts, as in argparse; another value before it is a contradiction."""
    arguments = Arguments({}, defaults)
    for one in given:
        before = arguments.given.get(one.name)
        if before and before.value != one.value:
            place = f" ({one.where})" if one.where else ""
            arguments.remark(CONTRADICTION, before.text, f"is given again as {one.text}{place}; the last one counts")
        arguments.given[one.name] = one
    return arguments
