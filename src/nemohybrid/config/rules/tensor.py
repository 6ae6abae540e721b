"""Rules of tensor and sequence parallelism: what the ranks that share every matrix must be able to share equally.

The vocabulary is cut unevenly: it needs no more than a row for every rank.
"""

import math

from nemohybrid.config.ranks import folds
from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, multiples_near, rule
from nemohybrid.config.violation import Violation

SHARED = {
    "mamba_num_groups": ("M", "Mamba groups"),
    "mamba_num_heads": ("M", "Mamba heads"),
    "num_attention_heads": ("*", "query heads"),
    "ffn_hidden_size": ("-", "channels of an MLP"),
    "moe_ffn_hidden_size": ("E", "channels of an expert"),
    "shared_expert_ffn_hidden_size": ("E", "channels of the shared expert"),
}
"""Key of `model` -> the layers that have so many of something, and what: each tensor rank takes an equal part."""


def tensor_sizes(now: Situation) -> list[int]:
    """Numbers of tensor ranks by which all layers can be shared, up to twice what was asked for."""
    asked = now.config.parallel.tensor
    common = math.gcd(*_counts(now).values()) or asked  # of a layer that is not ours nothing is known
    return [ranks for ranks in divisors(common) if ranks <= 2 * asked and not _odd_key_value_heads(now, ranks)]


def _counts(now: Situation, symbols: str = "M*-E") -> dict[str, int]:
    """What layers of these symbols have to share -> how many. The width of folded experts is shared by other ranks."""
    asked = [symbol for symbol in symbols if now.has(symbol)]
    folded = folds(now.config.parallel)
    keys = [key for key, (symbol, _) in SHARED.items() if symbol in asked]
    return {
        SHARED[k][1]: getattr(now.config.model, k) or 0 for k in keys if not (folded and k == "moe_ffn_hidden_size")
    }


def _odd_key_value_heads(now: Situation, ranks: int) -> int:
    """The key/value heads, where `ranks` can neither share them nor hold equally many copies; else 0."""
    heads = now.config.model.num_query_groups or 1
    return heads if now.has("*") and heads % ranks and ranks % heads else 0


def _equally(now: Situation, symbol: str) -> Violation | None:
    """What the layers of one symbol have that does not divide; what would be legal for all layers."""
    ranks = now.config.parallel.tensor
    found = [f"{count} {name}" for name, count in _counts(now, symbol).items() if count % ranks]
    if symbol == "*" and (heads := _odd_key_value_heads(now, ranks)):
        found.append(f"{heads} key/value heads")
    message = f"{' and '.join(found)} cannot be shared by it"
    return Violation(f"parallel.tensor={ranks}", message, {"parallel.tensor": tensor_sizes(now)}) if found else None


@rule(RUN_RULES, "M")
def mamba_over_tensor(now: Situation) -> Violation | None:
    """Mamba-2 is cut by groups, since the norm is over a group, and its heads go with them."""
    return _equally(now, "M")


@rule(RUN_RULES, "*")
def attention_over_tensor(now: Situation) -> Violation | None:
    """Query heads are cut; key/value heads are cut too, or repeated where there are fewer than ranks."""
    return _equally(now, "*")


@rule(RUN_RULES, "-")
def mlp_over_tensor(now: Situation) -> Violation | None:
    """The inner width is cut."""
    return _equally(now, "-")


@rule(RUN_RULES, "E")
def experts_over_tensor(now: Situation) -> Violation | None:
    """Every tensor rank holds a part of every expert, and of the shared one."""
    return _equally(now, "E")


@rule(RUN_RULES)
def vocabulary_over_tensor(now: Situation) -> Violation | None:
    """A rank without a row would have nothing to look tokens up in."""
    rows, ranks = now.config.model.vocab_size or 0, now.config.parallel.tensor
    if rows >= ranks:
        return None
    legal = {"model.vocab_size": f"{ranks} or more", "parallel.tensor": f"up to {rows}"}
    return Violation(f"parallel.tensor={ranks}", f"has more ranks than the vocabulary of {rows} has rows", legal)


@rule(RUN_RULES)
def sequence_over_tensor(now: Situation) -> Violation | None:
    """With sequence parallelism each tensor rank holds equally many tokens.

    Collectives take equal parts only: on others the process would abort in the middle of the first step.
    """
    length, parallel = now.config.data.sequence_length, now.config.parallel
    if not parallel.sequence or length % parallel.tensor == 0:
        return None
    where = f"data.sequence_length={length}"
    legal = {"data.sequence_length": multiples_near(length, parallel.tensor), "parallel.sequence": "false"}
    return Violation(where, f"its tokens cannot be shared by {parallel.tensor} tensor ranks", legal)


@rule(RUN_RULES)
def output_norms_of_whole_outputs(now: Situation) -> Violation | None:
    """A tensor rank sees a part of most outputs, and a summand of the others: neither has the norm that is asked for."""
    every, ranks = now.config.logging.output_norms, now.config.parallel.tensor
    if not every or ranks == 1:
        return None
    legal = {"logging.output_norms": "0", "parallel.tensor": "1"}
    return Violation(
        f"logging.output_norms={every}", f"outputs that {ranks} tensor ranks share are not measured yet", legal
    )
