"""Which recipe each product of a model has: ordered rules, of which the first that fits counts, and a default.

Rules are written as mappings, in a configuration or in a preset:

    {layers: last 15%, recipe: bf16}
    {kind: M, role: out_proj, recipe: mxfp8}
    {name: "layers.*.mixer.latent_*", recipe: bf16}
    {kind: mtp, recipe: bf16, optional: true}

All that a rule says must be so. Each of name, layers, kind and role may be a list, of which one must be so.
"""

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemohybrid.errors import ConfigError, did_you_mean, nearest
from nemohybrid.precision.place import NEVER, ROLES, Place
from nemohybrid.precision.recipe import RECIPES, GemmRecipe

KEYS = ("name", "layers", "kind", "role", "recipe", "optional")
MTP = "mtp"
BF16 = RECIPES["bf16"]
_END = re.compile(r"(?P<end>first|last) (?P<count>\d+)(?P<share>%)?")
_RANGE = re.compile(r"(?P<first>-?\d+)\.\.(?P<last>-?\d+)")
LAYERS = "a number, from 0 or -1 from the end, 2..5, first 2, last 8, last 15%"
"""How layers are named, for errors. Layers of MTP are in none of these: kind mtp names them."""


@dataclass(frozen=True)
class Rule:
    """All of `names` (globs), `layers`, `kinds` and `roles` that are not empty must hold. optional: it may fit nothing."""

    recipe: GemmRecipe
    names: tuple[str, ...] = ()
    layers: tuple[int | str, ...] = ()
    kinds: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    optional: bool = False

    def fits(self, place: Place) -> bool:
        """Whether it is about this product."""
        return (
            (not self.names or any(fnmatch.fnmatchcase(place.name, glob) for glob in self.names))
            and (
                not self.layers or (not place.mtp and any(place.layer in layers(w, place.layers) for w in self.layers))
            )
            and (not self.kinds or place.kind in self.kinds or (place.mtp and MTP in self.kinds))
            and (not self.roles or place.role in self.roles)
        )


@dataclass(frozen=True)
class Late:
    """From so many tokens on, what is quantized has another recipe; where there are rules, these decide, and not the first.

    forward_only: the products of the backward pass stay as they were, which is enough (NVIDIA 2025, section 4).
    """

    tokens: float
    recipe: GemmRecipe = BF16
    rules: tuple[Rule, ...] = ()
    forward_only: bool = False


@dataclass(frozen=True)
class Chosen:
    """The recipe of a place; the number of the rule that said so, None for the default; and the recipe of later, if any."""

    place: Place
    recipe: GemmRecipe
    rule: int | None = None
    late: GemmRecipe | None = None

    @property
    def recipes(self) -> tuple[GemmRecipe, ...]:
        """Of now, and of later if there is one."""
        return (self.recipe,) if self.late is None else (self.recipe, self.late)


@dataclass(frozen=True)
class Policy:
    """recipe: of what no rule fits."""

    recipe: GemmRecipe = BF16
    rules: tuple[Rule, ...] = ()
    late: Late | None = None

    def of(self, place: Place) -> Chosen:
        """The recipe of one product."""
        number, recipe = _first(self.rules, self.recipe, place)
        return Chosen(place, recipe, number, self._late(place, recipe))

    def _late(self, place: Place, early: GemmRecipe) -> GemmRecipe | None:
        if self.late is None:
            return None
        if self.late.rules:
            _, recipe = _first(self.late.rules, self.late.recipe, place)
        else:
            recipe = self.late.recipe if early.is_quantized else early
        return forward_of(recipe, early) if self.late.forward_only else recipe


def _first(rules: Sequence[Rule], default: GemmRecipe, place: Place) -> tuple[int | None, GemmRecipe]:
    return next(((number, rule.recipe) for number, rule in enumerate(rules) if rule.fits(place)), (None, default))


def forward_of(forward: GemmRecipe, backward: GemmRecipe) -> GemmRecipe:
    """The forward product of one recipe, those of the backward pass of another."""
    if forward.fprop == backward.fprop:
        return backward
    name, multiple = f"{forward.name}_forward_{backward.name}", math.lcm(forward.multiple, backward.multiple)
    return replace(backward, name=name, fprop=forward.fprop, multiple=multiple)


def layers(words: int | str, count: int) -> range:
    """The layers of a model of `count` that are meant; some may not be there. A share of them is rounded up."""
    if isinstance(words, int):
        number = words + count if words < 0 else words
        return range(number, number + 1)
    if match := _RANGE.fullmatch(words):
        first, last = (layers(int(match[end]), count)[0] for end in ("first", "last"))
        return range(first, last + 1)
    match = _END.fullmatch(words)
    assert match, f"{words} has been checked"
    some = -(-count * int(match["count"]) // 100) if match["share"] else int(match["count"])
    return range(some) if match["end"] == "first" else range(count - some, count)


# --- from what is written --------------------------------------------------------------------------------------------


def read_rule(written: Any) -> Rule:
    """A rule from a mapping. Raises ConfigError with the nearest legal value."""
    if not isinstance(written, Mapping):
        raise ConfigError(f"{written!r} is no rule, which is {{{', '.join(KEYS[:-1])}}} or some of these")
    for key in written:
        if key not in KEYS:
            raise ConfigError(
                f"a rule has no key {key!r}{did_you_mean(str(key), KEYS) or '. Keys: ' + ', '.join(KEYS)}"
            )
    if "recipe" not in written:
        raise ConfigError(f"the rule {dict(written)} names no recipe")
    optional = written.get("optional", False)
    if not isinstance(optional, bool):
        raise ConfigError(f"optional={optional!r} is not true or false")
    for key in ("name", "layers", "kind", "role"):
        if written.get(key) is not None and not _list(written[key]):
            raise ConfigError(
                f"{key}={written[key]!r} names nothing, which would fit everything; leave it out for that"
            )
    names, some, kinds, roles = (_list(written.get(key)) for key in ("name", "layers", "kind", "role"))
    for words in some:
        _check_layers(words)
    for role in roles:
        _check_role(role)
    recipe = recipe_named(written["recipe"])
    return Rule(recipe, tuple(map(str, names)), tuple(some), tuple(map(str, kinds)), tuple(map(str, roles)), optional)


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def recipe_named(name: Any) -> GemmRecipe:
    """Raises ConfigError with the nearest names."""
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(
            f"{name!r} is no recipe{did_you_mean(str(name), RECIPES) or '.'} Recipes: {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def _check_layers(words: Any) -> None:
    """Raises ConfigError for what names no layers."""
    is_number = isinstance(words, int) and not isinstance(words, bool)
    match = isinstance(words, str) and (_RANGE.fullmatch(words) or _END.fullmatch(words))
    if not is_number and not match:
        raise ConfigError(f"layers={words!r} names no layers. Legal: {LAYERS}")
    if match and match.re is _END and match["share"] and int(match["count"]) > 100:
        raise ConfigError(f"layers={words!r}: no more than 100% of the layers are there")


def _check_role(role: Any) -> None:
    """Raises ConfigError for what no policy may quantize."""
    role = role if isinstance(role, str) else str(role)
    if role in NEVER:
        raise ConfigError(f"role={role} can never be quantized: {NEVER[role]}. Legal: {', '.join(ROLES)}")
    if role not in ROLES:
        raise ConfigError(f"{role!r} is no role{did_you_mean(str(role), ROLES) or '.'} Roles: {', '.join(ROLES)}")


# --- what a rule is about --------------------------------------------------------------------------------------------


def idle_rules(rules: Sequence[Rule], places: Sequence[Place]) -> dict[int, str]:
    """Number of each rule that fits no product of a whole model and should -> why, with what there is."""
    return {
        number: _why_idle(rule, places)
        for number, rule in enumerate(rules)
        if not rule.optional and not any(map(rule.fits, places))
    }


def _why_idle(rule: Rule, places: Sequence[Place]) -> str:
    for glob in rule.names:
        if not fnmatch.filter([place.name for place in places], glob):
            never = next((what for what in NEVER if re.search(rf"(?<![a-z]){what}(?![a-z])", glob)), None)
            why = f"{never} can never be quantized" if never else f"no product is named {glob}"
            return f"{why}. {_nearest_names(glob, places)}"
    for kind in rule.kinds:
        there = [*dict.fromkeys([place.kind for place in places] + [MTP for place in places if place.mtp])]
        if kind not in there:
            return f"no layer is of kind {kind}. Kinds: {', '.join(there)}"
    for role in rule.roles:
        there = [*dict.fromkeys(place.role for place in places)]
        if role not in there:
            return f"no product has the role {role}. Roles here: {', '.join(there)}"
    count = places[0].layers if places else 0
    if rule.layers and not any(set(layers(words, count)) & set(range(count)) for words in rule.layers):
        return f"the model has layers 0 to {count - 1}"
    return "no product is all of that"


def _nearest_names(glob: str, places: Sequence[Place]) -> str:
    """Names are compared with * for their numbers: the layers of a kind differ by nothing else."""
    shapes = [*dict.fromkeys(re.sub(r"\d+", "*", place.name) for place in places)]
    return f"Nearest: {', '.join(nearest(glob, shapes) or shapes)}"
