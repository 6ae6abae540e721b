"""Who carries a recipe out: chosen by name, or the first that can. Nothing falls back silently."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemohybrid.errors import ConfigError
from nemohybrid.precision.backends import transformer_engine
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.backends.emulated_experts import expert_products
from nemohybrid.precision.backends.torch_native import NativeGemm
from nemohybrid.precision.backends.torch_obstacles import obstacle as torch_obstacle
from nemohybrid.precision.gemm import Gemm, plain_gemm
from nemohybrid.precision.recipe import GemmRecipe
from nemohybrid.precision.slot import Slot
from nemohybrid_kernels.backend import Backend as Candidate
from nemohybrid_kernels.backend import decide
from nemohybrid_kernels.errors import BackendError
from nemohybrid_kernels.moe.products import Products

Region = Callable[[], AbstractContextManager[Any]]


def _none(recipe: GemmRecipe, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """obstacle(recipe, device): why it cannot carry out a recipe there, and how it could; None where it can. gemm: fills the
    slot of a layer. experts: the products of one of their stacked matrices, where it has any.

    around(recipes): called once before the slots of a model are filled, with the recipes that this backend carries out in it.
    What it returns makes a context for each forward pass. Raises ConfigError for what does not go together.
    """

    name: str
    obstacle: Callable[[GemmRecipe, torch.device], str | None]
    gemm: Callable[[GemmRecipe, Slot], Gemm]
    experts: Callable[[GemmRecipe, Slot], Products] | None = None
    around: Callable[[Collection[GemmRecipe]], Region] | None = None

    def obstacle_of(self, recipe: GemmRecipe, experts: bool, device: torch.device) -> str | None:
        """The same for a `Linear` or for stacked experts."""
        if experts and self.experts is None:
            return "it multiplies no stacked experts"
        return self.obstacle(recipe, device)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "transformer_engine",
            transformer_engine.obstacle,
            transformer_engine.EngineGemm,
            around=transformer_engine.around,
        ),
        Backend("torch_native", torch_obstacle, NativeGemm),
        Backend("emulated", _none, EmulatedGemm, expert_products),
    )
}
"""In the order in which "auto" tries them."""
PLAIN = Backend("plain", _none, lambda recipe, slot: plain_gemm)
"""Where nothing is quantized."""


@dataclass(frozen=True)
class Choice:
    """Who carries a recipe out, and why: for the log and the run's metadata."""

    recipe: GemmRecipe
    backend: Backend
    why: str

    @property
    def name(self) -> str:
        return self.backend.name

    def gemm(self, recipe: GemmRecipe, slot: Slot) -> Gemm:
        """Fills the slot of a layer."""
        return self.backend.gemm(recipe, slot)

    def __str__(self) -> str:
        return f"{self.recipe.name}: {self.name} ({self.why})"


def choose(recipe: GemmRecipe, wanted: str, device: torch.device, *, experts: bool = False) -> Choice:
    """Who carries out a recipe for a `Linear`, or for stacked experts, on a device. Raises ConfigError where `wanted` cannot."""
    if not recipe.is_quantized:
        return Choice(recipe, PLAIN, "nothing is quantized")
    what = f"{recipe.name} of experts" if experts else recipe.name
    if wanted in BACKENDS and (obstacle := BACKENDS[wanted].obstacle_of(recipe, experts, device)) is not None:
        others = "precision.backend=auto takes one that can"
        advice = f"{others}, and a rule {{role: expert, recipe: bf16}} leaves them as they are" if experts else others
        raise ConfigError(f"precision.backend={wanted} cannot carry out {what} on {device}: {obstacle}. {advice}")
    candidates = {
        name: Candidate(run=backend.gemm, obstacle=partial(backend.obstacle_of, recipe, experts))
        for name, backend in BACKENDS.items()
    }
    try:
        found = decide(what, wanted, candidates, device)
    except BackendError as error:  # no such name
        raise ConfigError(f"precision.backend: {error}") from None
    return Choice(recipe, BACKENDS[found.backend], found.why)


def surround(choices: Collection[Choice]) -> Region:
    """What makes the context of each forward pass of a model whose slots are filled by `choices`. Raises ConfigError for what
    does not go together."""
    for backend in {choice.name: choice.backend for choice in choices}.values():
        if backend.around is not None:
            return backend.around([choice.recipe for choice in choices if choice.backend == backend])
    return nullcontext
