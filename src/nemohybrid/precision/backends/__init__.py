"""Who carries a recipe out: chosen by name, or the first that can. Nothing falls back silently."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemohybrid.precision.gemm import Gemm
from nemohybrid.precision.recipe import GemmRecipe
from nemohybrid.precision.slot import Slot


@dataclass(frozen=True)
class Backend:
    """obstacle(recipe, device): why it cannot carry out a recipe there, and how it could; None where it can. gemm: fills the
    slot of a layer."""

    name: str
    obstacle: Callable[[GemmRecipe, torch.device], str | None]
    gemm: Callable[[GemmRecipe, Slot], Gemm]
