"""What has been translated so far."""

from dataclasses import dataclass, field
from typing import Any

from nemohybrid.interop.megatron.arguments import (
    CONTRADICTION,
    DEFAULT,
    NO_COUNTERPART,
    NOT_NEEDED,
    TO_GIVE,
    Arguments,
    Remark,
    is_open,
    texts,
)


@dataclass
class Translation:
    """Our keys and their values, and the arguments they come from. Remarks live in the arguments."""

    arguments: Arguments
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def remarks(self) -> list[Remark]:
        """Everything that has to be said, in the order in which it was found."""
        return self.arguments.remarks

    def put(self, key: str, value: Any, *sources: str) -> None:
        """Set one of our keys; None changes nothing. What Hydra would resolve or cannot read is left to the user.

        `sources`: the arguments it follows from, to name defaults.
        """
        if value is None:
            return
        if is_open(value):
            self.to_give(key, "the file does not say what the variable is")
            return
        if not all(text.isprintable() for text in texts(value)):
            self.to_give(key, "the file has it with characters that a command line cannot hold")
            return
        self.overrides[key] = value
        absent = [name for name in sources if not self.arguments.has(name)]
        if sources and len(absent) == len(sources) and self.arguments.defaults:
            shown = str(value).lower() if isinstance(value, bool) else value
            self.arguments.remark(DEFAULT, f"{key}={shown}", "from " + ", ".join(map(self.arguments.shown, absent)))

    def contradiction(self, name: str, reason: str) -> None:
        """An argument that does not go with another."""
        self._say(CONTRADICTION, name, reason)

    def no_counterpart(self, name: str, reason: str) -> None:
        """An argument that changes a run and that we do not have."""
        self._say(NO_COUNTERPART, name, reason)

    def not_needed(self, name: str, reason: str) -> None:
        """An argument that changes nothing here, and why."""
        self._say(NOT_NEEDED, name, reason)

    def to_give(self, key: str, reason: str) -> None:
        """One of our keys that the file cannot fill."""
        self.arguments.remark(TO_GIVE, key, reason)

    def _say(self, kind: str, name: str, reason: str) -> None:
        given = self.arguments.given.get(name)
        default = self.arguments.defaults.get(name)
        subject = given.text if given else self.arguments.shown(name) + (f" {default}" if default is not None else "")
        self.arguments.taken.add(name)
        self.arguments.remark(kind, subject, reason if given else f"{reason} (Megatron-LM's default)")
