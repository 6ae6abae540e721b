"""Rules of the numbers that matrices multiply in."""

from collections.abc import Iterable, Sequence

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.precision import BACKENDS, policy_of
from nemohybrid.config.products import OF_SYMBOL, products
from nemohybrid.config.ranks import expert_tensor
from nemohybrid.config.rules.rule import RUN_RULES, Situation, rule
from nemohybrid.config.rules.tensor import tensor_sizes
from nemohybrid.config.violation import Violation
from nemohybrid.precision.place import Place
from nemohybrid.precision.policy import Policy, idle_rules

LAYERS = {"M": "the Mamba", "*": "the attention", "-": "an MLP's", "E": "the MoE"}
"""Symbol -> whose product it is, in words."""


@rule(RUN_RULES)
def policy_of_this_model(now: Situation) -> Violation | None:
    """Every rule must be about something. Where a symbol is not ours, only the built model could tell."""
    if now.pattern is None or not set(now.pattern.main + now.pattern.mtp) <= OF_SYMBOL.keys():
        return None
    policy, places = policy_of(now.config.precision), products(now.config.model, now.pattern)
    idle = {f"precision.rules[{number}]": why for number, why in idle_rules(policy.rules, places).items()}
    if policy.late:
        late = idle_rules(policy.late.rules, places)
        idle |= {f"precision.late.rules[{number}]": why for number, why in late.items()}
    where, why = next(iter(idle.items()), ("", ""))
    also = "".join(f"\nand {other}: {reason}" for other, reason in list(idle.items())[1:])
    return Violation(where, f"fits nothing: {why}{also}") if idle else None


@rule(RUN_RULES)
def late_recipe_has_a_time(now: Situation) -> Violation | None:
    """What comes later must be told when."""
    late = now.config.precision.late
    given = {"recipe": late.recipe != "bf16", "rules": bool(late.rules), "forward_only": late.forward_only}
    key = next((key for key, is_given in given.items() if is_given), None)
    if late.tokens is not None or key is None:
        return None
    return Violation(f"precision.late.{key}", "counts from precision.late.tokens on, which is empty")


@rule(RUN_RULES)
def late_recipe_within_the_run(now: Situation) -> Violation | None:
    """A switch that never comes is a mistake in its number."""
    late, train = now.config.precision.late, now.config.train
    most = BatchPlan(train, now.config.data.sequence_length).progress(train.steps, "tokens")
    if late.tokens is None or late.tokens < most:
        return None
    message = f"comes after the end of the run, which sees {most:,} tokens"
    return Violation(f"precision.late.tokens={late.tokens:g}", message, {"precision.late.tokens": f"below {most}"})


@rule(RUN_RULES)
def health_that_is_seen(now: Situation) -> Violation | None:
    """Modules of Transformer Engine quantize out of sight. Where `auto` takes them, the run says so at its start."""
    every, backend = now.config.logging.precision_every, now.config.precision.backend
    if not every or backend != "transformer_engine":
        return None
    legal = {"precision.backend": [name for name in BACKENDS if name != backend], "logging.precision_every": [0]}
    return Violation(f"logging.precision_every={every}", f"sees nothing of what {backend} quantizes", legal)


@rule(RUN_RULES)
def widths_of_the_recipe(now: Situation) -> Violation | None:
    """What counts is what one rank multiplies: 10304 outputs may do, an eighth of them may not.

    Megatron-LM checks the whole width only (mamba_mixer.py), which Nemotron 3 Nano with 8 tensor ranks passes. The emulation
    takes any width that is whole, with a shorter block at its end, as no hardware does.
    """
    asked = now.config.parallel
    is_whole = asked.tensor == expert_tensor(asked) == 1
    if now.pattern is None or (is_whole and now.config.precision.backend == "emulated"):
        return None
    policy, ranks, possible = policy_of(now.config.precision), now.config.parallel.tensor, tensor_sizes(now)
    found = _odd_widths(_places(now, ranks), policy)
    if not found or ranks not in possible:
        return None  # where ranks have no equal parts, the rules of tensor parallelism speak
    fitting = [size for size in possible if not _odd_widths(_places(now, size), policy)]
    recipe, multiple = next(iter(found))
    message = f"{recipe} takes multiples of {multiple}, but a rank has {' and '.join(found[recipe, multiple])}"
    names = [*dict.fromkeys(f'"*.{words.rpartition(" ")[2]}"' for words in found[recipe, multiple])]
    first = f"begin with {{name: [{', '.join(names)}], recipe: bf16}}"
    legal = {"parallel.tensor": fitting, "precision.recipe": ["bf16"], "precision.rules": first}
    legal |= {"precision.backend": ["emulated"]} if is_whole else {}
    where = f"precision.recipe={now.config.precision.recipe}"
    return Violation(where, message, {key: values for key, values in legal.items() if values})


def _places(now: Situation, ranks: int) -> Sequence[Place]:
    """With so many tensor ranks, and experts shared as it is asked for."""
    assert now.pattern is not None
    asked = now.config.parallel
    shared = expert_tensor(asked) if expert_tensor(asked) != asked.tensor else ranks
    return products(now.config.model, now.pattern, ranks, shared)


def _odd_widths(places: Iterable[Place], policy: Policy) -> dict[tuple[str, int], list[str]]:
    """Recipe, and what it takes multiples of -> the widths that are none, in words."""
    found: dict[tuple[str, int], dict[str, None]] = {}
    for place in places:
        for recipe in policy.of(place).recipes:
            for width, what in ((place.outputs, "outputs"), (place.inputs, "inputs")):
                if width % recipe.multiple:
                    words = f"{width} {what} of {LAYERS[place.kind]} {place.name.rpartition('.mixer.')[2]}"
                    found.setdefault((recipe.name, recipe.multiple), {})[words] = None
    return {key: list(words) for key, words in found.items()}
