"""Which implementation of an operator runs: asked for by name, or the first one that can run here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemohybrid_kernels.errors import BackendError


def _runs_anywhere(device: torch.device) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `obstacle(device)` is None where `run` works, and otherwise says what is missing and how to get it.
    """

    run: Callable[..., Any]
    obstacle: Callable[[torch.device], str | None] = _runs_anywhere


def choose(operator: str, wanted: str, backends: Mapping[str, Backend], device: torch.device) -> Callable[..., Any]:
    """The function to call for `operator` on `device`.

    `backends` is ordered, fastest first; "auto" takes the first without an obstacle, and the last never has one. A
    backend asked for by name is used or refused, never replaced. Raises BackendError.
    """
    if wanted == "auto":
        return next(backend.run for backend in backends.values() if backend.obstacle(device) is None)
    if wanted not in backends:
        legal = ", ".join(repr(name) for name in ("auto", *backends))
        raise BackendError(f"{operator} has no backend {wanted!r}. Legal: {legal}")
    backend = backends[wanted]
    if (obstacle := backend.obstacle(device)) is not None:
        advice = "backend='auto' picks one that can"
        raise BackendError(f"{operator}: backend {wanted!r} cannot run on {device}: {obstacle}. {advice}")
    return backend.run
