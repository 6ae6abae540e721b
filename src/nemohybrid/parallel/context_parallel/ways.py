"""How what looks across tokens travels between context ranks, by kind of layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ways:
    """attention: `heads` or `ring`; mamba: `heads` or `states` (see the package)."""

    attention: str = "heads"
    mamba: str = "states"
