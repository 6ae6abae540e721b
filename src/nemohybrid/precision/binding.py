"""A model's products, filled as a policy says: with plain ones, or with those of a backend."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemohybrid.precision.backends import Choice, choose, surround
from nemohybrid.precision.delayed import DelayedScales, step_all
from nemohybrid.precision.policy import Chosen, Policy
from nemohybrid.precision.recipe import GemmRecipe
from nemohybrid.precision.slot import Slot

PREFIX = "precision."
"""Of what checkpoints hold of delayed scaling."""


@dataclass(frozen=True)
class Site:
    """Where a product is made: the `gemm` of a module, or one of the `products` of stacked experts, by name of the matrix."""

    slot: Slot
    module: Any
    matrix: str = ""

    def fill(self, choice: Choice) -> None:
        """From now on it multiplies so."""
        if not self.matrix:
            self.module.gemm = choice.gemm(choice.recipe, self.slot)
            return
        others = {name: of for name, of in (self.module.products or {}).items() if name != self.matrix}
        if choice.recipe.is_quantized:
            assert choice.backend.experts is not None, "it has been chosen for experts"
            others[self.matrix] = choice.backend.experts(choice.recipe, self.slot)
        self.module.products = others or None

    def with_scales(self, recipe: GemmRecipe, device: torch.device) -> "Site":
        """The same with what delayed scaling remembers. It is no part of the model: another recipe, or nobody, may go on."""
        formats = [of.format for of in (recipe.fprop.left, recipe.fprop.right, recipe.dgrad.left)]
        return replace(self, slot=replace(self.slot, scales=DelayedScales(formats, device=device)))


class Binding:
    """Every product of a rank's model with its recipe, and the switch to those of later.

    Raises ConfigError, before anything is filled, where nobody that was asked for can carry out a recipe of now or later.
    """

    def __init__(self, sites: Iterable[Site], policy: Policy, backend: str, device: torch.device) -> None:
        self.policy, self.is_late = policy, False
        self.sites, self.rows = list(sites), list[Chosen]()
        self._choices: dict[tuple[GemmRecipe, bool], Choice] = {}
        for number, site in enumerate(self.sites):
            row = policy.of(site.slot)
            for recipe in row.recipes:
                self._choices.setdefault(
                    (recipe, bool(site.matrix)), choose(recipe, backend, device, experts=bool(site.matrix))
                )
            delayed = next((recipe for recipe in row.recipes if recipe.is_delayed), None)
            self.sites[number] = site if delayed is None else site.with_scales(delayed, device)
            self.rows.append(row)
            if site.matrix and any(recipe.is_quantized for recipe in row.recipes):
                site.module.takes_products = True
        self.region = surround(self.choices)
        self._fill()

    @property
    def choices(self) -> list[Choice]:
        """Who carries out each recipe that is not plain, for one matrix or for stacked ones."""
        return [choice for choice in self._choices.values() if choice.recipe.is_quantized]

    def _fill(self) -> None:
        for site, row in zip(self.sites, self.rows, strict=True):
            recipe = row.recipes[-1] if self.is_late else row.recipe
            site.fill(self._choices[recipe, bool(site.matrix)])

    def at(self, tokens: float) -> None:
        """Before a step that begins when the run has seen so many tokens. A run that was resumed asks again."""
        late = self.policy.late
        is_late = late is not None and tokens >= late.tokens
        if is_late != self.is_late:
            self.is_late = is_late
            self._fill()

    @property
    def _scales(self) -> list[DelayedScales]:
        return [site.slot.scales for site in self.sites if site.slot.scales is not None]

    def before_passes(self) -> None:
        """Before each attempt at a step: delayed scaling goes by what this one sees."""
        for scales in self._scales:
            scales.forget()

    def tensors(self) -> dict[str, Tensor]:
        """What a run must save to go on as if it had never stopped, ready to be filled in place."""
        states = {site.slot.name: site.slot.scales for site in self.sites if site.slot.scales is not None}
        return {f"{PREFIX}{name}.{key}": value for name, of in states.items() for key, value in of.state_dict().items()}

    def after_step(self, largest: Callable[[Tensor], Tensor]) -> None:
        """What delayed scaling does after a step of the optimizer. largest: over the ranks that hold the same layers."""
        step_all(self._scales, largest)
