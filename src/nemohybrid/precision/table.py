"""A resolved policy for people and for files."""

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nemohybrid.precision.policy import MTP, Chosen, Policy
from nemohybrid.precision.recipe import BF16, GemmRecipe, Operand, Product


def table(policy: Policy, chosen: Sequence[Chosen]) -> list[str]:
    """A line for each kind of layer, and those of its layers in which the same products have the same recipes.

    `M 0-72 (33)  in_proj  nvfp4`: 33 layers of kind M, from 0 to 72.
    """
    rows = [row for kind in dict.fromkeys(map(_kind, chosen)) for row in _rows(kind, chosen)]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    head = "precision" if policy.late is None else f"precision, and from {policy.late.tokens:,.0f} tokens on"
    cells = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return [head, *(f"  {left}  {row[3]}" for left, row in zip(cells, rows, strict=True))] if rows else []


def _kind(chosen: Chosen) -> str:
    return f"{MTP} {chosen.place.kind}" if chosen.place.mtp else chosen.place.kind


def _rows(kind: str, chosen: Sequence[Chosen]) -> list[tuple[str, str, str, str]]:
    """(kind, layers, products, recipe) of one kind. What was said in the line above is left out."""
    layers: dict[int, dict[str, str]] = {}  # number -> role -> recipes
    for row in chosen:
        if _kind(row) == kind:
            recipes, role = layers.setdefault(row.place.layer, {}), row.place.role
            names = dict.fromkeys([*filter(None, recipes.get(role, "").split(" or ")), _recipes(row)])
            recipes[role] = " or ".join(names)
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for number, recipes in layers.items():
        alike.setdefault(tuple(recipes.items()), []).append(number)
    result: list[tuple[str, str, str, str]] = []
    for recipes, numbers in alike.items():
        where = _ranges(numbers, list(layers))
        for recipe in dict.fromkeys(recipe for _, recipe in recipes):
            roles = ", ".join(role for role, of in recipes if of == recipe)
            result.append(("" if result else kind, where, roles, recipe))
            where = ""
    return result


def _recipes(row: Chosen) -> str:
    return " then ".join(dict.fromkeys(recipe.name for recipe in row.recipes))


def _ranges(numbers: Sequence[int], among: Sequence[int]) -> str:
    """`0-8 (5), 20`: runs of those layers of a kind that follow each other, and how many they are."""
    places = {number: place for place, number in enumerate(among)}
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: places[pair[1]] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]} ({len(run)})" if len(run) > 1 else str(run[0]) for run in runs)


def as_json(policy: Policy, chosen: Sequence[Chosen]) -> dict[str, Any]:
    """All that was resolved: each product with its recipe and the number of the rule that said so, and what each recipe does
    to its operands."""
    recipes = {recipe.name: recipe for row in chosen for recipe in row.recipes}
    return {
        "late_tokens": None if policy.late is None else policy.late.tokens,
        "recipes": {name: _described(recipe) for name, recipe in recipes.items()},
        "products": {
            row.place.name: {"recipe": row.recipe.name, "rule": row.rule}
            | ({} if row.late is None else {"late_recipe": row.late.name})
            for row in chosen
        },
    }


def _described(recipe: GemmRecipe) -> dict[str, Any]:
    """What is not as it is in plain bf16."""
    products = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
    return {
        product: dict(zip(names, map(_operand, (of.left, of.right)), strict=True))
        for product, names in products.items()
        if (of := getattr(recipe, product)) != Product()
    }


def _operand(of: Operand) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(of).items() if value != getattr(BF16, key)}
