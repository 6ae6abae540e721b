"""`precision`: in which numbers matrices multiply, layer by layer. Speed and rounding, so a resumed run may have others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemohybrid.config.section import Section, option
from nemohybrid.errors import ConfigError
from nemohybrid.precision.policy import Late, Policy, read_rule
from nemohybrid.precision.recipe import RECIPES

BACKENDS = ("auto", "emulated", "torch_native", "transformer_engine")


def rules_problem(value: Any) -> str:
    """Why `value` is no list of rules; an empty string when it is."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return "is no list of rules"
    return "; ".join(f"rule {number}: {problem}" for number, rule in enumerate(value) if (problem := _problem(rule)))


def _problem(rule: Any) -> str:
    try:
        read_rule(rule)
    except ConfigError as error:
        return str(error)
    return ""


def _recipe(what: str) -> Any:
    return option("bf16", what, choices=tuple(RECIPES))


def _rules(what: str) -> Any:
    return option([], what, problem=rules_problem)


@dataclass
class LateSection(Section):
    """From a number of tokens on, what is quantized has another recipe."""

    tokens: float | None = option(None, "when: tokens of the run; empty: never", minimum=0.0)
    recipe: str = _recipe("what is quantized has this recipe then")
    rules: Any = _rules("with rules, these and the recipe decide for every product, as those of `precision` did before")
    forward_only: bool = option(False, "only the forward product changes")


@dataclass
class PrecisionSection(Section):
    """How matrices multiply. `bf16` means: in `model.dtype`, nothing quantized."""

    recipe: str = _recipe("the recipe of products that no rule names")
    rules: Any = _rules(
        "{name, layers, kind, role, recipe}, ...: the first that fits a product says its recipe; "
        'e.g. [{layers: "last 15%", recipe: bf16}]'
    )
    late: LateSection = field(default_factory=LateSection)
    backend: str = option("auto", "who multiplies; auto: the first of the others that can, here", choices=BACKENDS)


def policy_of(section: PrecisionSection) -> Policy:
    """The policy that a checked section describes."""
    late = section.late
    rules, late_rules = (tuple(map(read_rule, written)) for written in (section.rules, late.rules))
    later = None if late.tokens is None else Late(late.tokens, RECIPES[late.recipe], late_rules, late.forward_only)
    return Policy(RECIPES[section.recipe], rules, later)
