"""Recipes for stacked experts, emulated: each expert's rows and matrix are quantized by themselves, as if it were a layer."""

from itertools import pairwise

import torch
from torch import Tensor

from nemohybrid.precision.backends.emulated import Prepared, operand_of, product
from nemohybrid.precision.recipe import GemmRecipe, Operand
from nemohybrid.precision.slot import Slot
from nemohybrid_kernels.moe.products import Products
from nemohybrid_kernels.moe.visits import Visits

# n rows, sorted by expert; E experts; I, O features in and out


def expert_products(recipe: GemmRecipe, slot: Slot) -> Products:
    """For one of the stacked matrices of the experts. Rows of experts are segments, so their numbers are read by the host."""
    return _Experts(recipe, slot).products


class _Experts:
    def __init__(self, recipe: GemmRecipe, slot: Slot) -> None:
        self.recipe, self.slot = recipe, slot
        self.products = Products(self.rows, self.matrices, self.gradients)

    def rows(self, rows: Tensor, matrices: Tensor, visits: Visits) -> Tensor:
        """rows [n, I], matrices [E, I, O] -> [n, O]."""
        of = self.recipe.fprop
        return self._by_expert(rows, matrices, visits, ("x", of.left, of.right), "fprop")

    def gradients(self, rows: Tensor, matrices: Tensor, visits: Visits) -> Tensor:
        """The same of gradients, where `matrices` are the weights as they are stored, [E, outputs, inputs]."""
        of = self.recipe.dgrad
        return self._by_expert(rows, matrices, visits, ("dy", of.left, of.right), "dgrad")

    def matrices(self, left: Tensor, right: Tensor, visits: Visits) -> Tensor:
        """left [n, O] of gradients, right [n, I] of rows -> [E, O, I]."""
        of, out = self.recipe.wgrad, left.new_zeros(len(visits.ends), left.shape[1], right.shape[1])
        for expert, segment in enumerate(_segments(visits)):
            dy = self._prepared(left[segment].T, of.left, "dy", f"wgrad.dy.{expert}")
            x = self._prepared(right[segment].T, of.right, "x", f"wgrad.x.{expert}")
            out[expert] = product(of, dy, x)
        return out

    def _by_expert(
        self, rows: Tensor, matrices: Tensor, visits: Visits, operands: tuple[str, Operand, Operand], pass_: str
    ) -> Tensor:
        which, left, right = operands
        out = torch.zeros(len(rows), matrices.shape[2], dtype=rows.dtype, device=rows.device)
        for expert, segment in enumerate(_segments(visits)):
            row = self._prepared(rows[segment], left, which, f"{pass_}.{which}.{expert}")
            weight = self._prepared(matrices[expert].T, right, "w", f"{pass_}.w.{expert}")
            of = self.recipe.fprop if pass_ == "fprop" else self.recipe.dgrad
            out[segment] = product(of, row, weight).to(out.dtype)
        return out

    def _prepared(self, x: Tensor, operand: Operand, which: str, what: str) -> Prepared:
        return operand_of(x, operand, self.slot, which, what, self.slot.clock.place)


def _segments(visits: Visits) -> list[slice]:
    """Also of experts whom nobody visits: ranks that share an expert exchange the largest of its parts in step."""
    ends = [0, *visits.ends.tolist()]
    return [slice(start, end) for start, end in pairwise(ends)]
