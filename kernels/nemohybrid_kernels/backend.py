"""Which implementation of an operator runs: asked for by name, or the first one that can run here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemohybrid_kernels.errors import BackendError


def _nothing(device: torch.device) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `obstacle(device)` is None where `run` works, and otherwise says what is missing and how to get it. `reluctance(device)`
    is None where "auto" may take it, and otherwise says why only who asks for it gets it.
    """

    run: Callable[..., Any]
    obstacle: Callable[[torch.device], str | None] = _nothing
    reluctance: Callable[[torch.device], str | None] = _nothing


@dataclass(frozen=True)
class Choice:
    """A decision and its reason, for a log."""

    operator: str
    backend: str
    run: Callable[..., Any]
    why: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.why})"


def lines_of(choices: Iterable[Choice]) -> list[str]:
    """A line for each backend and reason, with all operators that it was chosen for."""
    operators: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        operators.setdefault((choice.backend, choice.why), []).append(choice.operator)
    return [f"{', '.join(names)}: {backend} ({why})" for (backend, why), names in operators.items()]


def decide(operator: str, wanted: str, backends: Mapping[str, Backend], device: torch.device) -> Choice:
    """What runs for `operator` on `device`, and why.

    `backends` is ordered, fastest first; "auto" takes the first that nothing speaks against, and against the last nothing
    ever does. A backend asked for by name is used or refused, never replaced. Raises BackendError.
    """
    if wanted == "auto":
        return _first_possible(operator, backends, device)
    if wanted not in backends:
        legal = ", ".join(repr(name) for name in ("auto", *backends))
        raise BackendError(f"{operator} has no backend {wanted!r}. Legal: {legal}")
    backend = backends[wanted]
    if (obstacle := backend.obstacle(device)) is not None:
        advice = "backend='auto' picks one that can"
        raise BackendError(f"{operator}: backend {wanted!r} cannot run on {device}: {obstacle}. {advice}")
    return Choice(operator, wanted, backend.run, "asked for")


def _first_possible(operator: str, backends: Mapping[str, Backend], device: torch.device) -> Choice:
    passed_over = []
    for name, backend in backends.items():
        reason = backend.obstacle(device) or backend.reluctance(device)
        if reason is None:
            why = (
                "auto; " + "; ".join(f"not {other}: {_briefly(reason)}" for other, reason in passed_over)
                if passed_over
                else "auto"
            )
            return Choice(operator, name, backend.run, why)
        passed_over.append((name, reason))
    raise AssertionError(f"{operator} has no backend that runs anywhere")


def _briefly(obstacle: str) -> str:
    """Without how to overcome it, which is for who asks for that backend."""
    return obstacle.partition(";")[0]


def choose(operator: str, wanted: str, backends: Mapping[str, Backend], device: torch.device) -> Callable[..., Any]:
    """The function to call: that of `decide`."""
    return decide(operator, wanted, backends, device).run
