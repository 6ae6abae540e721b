"""Rules of context parallelism: what ranks that share the tokens of a row must be able to share."""

from nemohybrid.config.context import attention_heads, attention_way, heads_divide, mamba_heads, mamba_way
from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, multiples_near, rule
from nemohybrid.config.violation import Violation


@rule(RUN_RULES)
def sequence_over_context(now: Situation) -> Violation | None:
    """A sequence is cut in two pieces a rank, to balance causal attention."""
    length, ranks = now.config.data.sequence_length, now.config.parallel.context
    if ranks > 1 and length % (2 * ranks):
        where, legal = f"data.sequence_length={length}", multiples_near(length, 2 * ranks)
        return Violation(where, f"does not cut into 2 x {ranks} pieces", {"data.sequence_length": legal})
    return None


@rule(RUN_RULES)
def method_of_context_ranks(now: Situation) -> Violation | None:
    """Without context ranks it would change nothing."""
    parallel = now.config.parallel
    if parallel.context > 1 or parallel.context_method == "auto":
        return None
    legal = {"parallel.context_method": "auto", "parallel.context": "2 or more"}
    where = f"parallel.context_method={parallel.context_method}"
    return Violation(where, "changes nothing with parallel.context=1", legal)


@rule(RUN_RULES)
def tokens_of_a_context_rank(now: Situation) -> Violation | None:
    """What a rank needs of its neighbours' tokens, none but the nearest has."""
    length, ranks, model = now.config.data.sequence_length, now.config.parallel.context, now.config.model
    if ranks == 1:
        return None
    taps = model.conv_kernel - 1 if now.has("M") else 0
    needed = max(taps, now.pattern.mtp_depth if now.pattern else 0)
    if length // ranks >= needed:
        return None
    message = f"{length // ranks} tokens of a rank are fewer than the {needed} that its neighbour needs of it"
    return Violation(f"parallel.context={ranks}", message, {"data.sequence_length": f"{ranks * needed} or more"})


@rule(RUN_RULES, "M")
def mamba_over_context(now: Situation) -> Violation | None:
    """By all_to_all, context ranks share the heads of a tensor rank instead of tokens; its groups they share or repeat.

    So they do in Megatron-LM (mamba_context_parallel.py).
    """
    model, tensor = now.config.model, now.config.parallel.tensor
    if mamba_way(now.config) != "heads" or model.mamba_num_groups % tensor or (model.mamba_num_heads or 0) % tensor:
        return None  # the rule of tensor parallelism speaks
    return _shared(now, *mamba_heads(model, tensor), "Mamba heads", "groups")


@rule(RUN_RULES, "*")
def attention_over_context(now: Situation) -> Violation | None:
    """The same in attention, where they repeat key/value heads."""
    if attention_way(now.config) != "heads":
        return None
    return _shared(
        now, *attention_heads(now.config.model, now.config.parallel.tensor), "query heads", "key/value heads"
    )


def _shared(now: Situation, heads: int, groups: int, name: str, of_groups: str) -> Violation | None:
    ranks = now.config.parallel.context
    legal = [number for number in divisors(max(1, heads)) if heads_divide(heads, groups, number)]
    if ranks in legal:
        return None
    message = f"the {heads} {name} and {groups} {of_groups} of a tensor rank cannot be shared by it"
    ways = ["auto", "ring+states"]
    return Violation(f"parallel.context={ranks}", message, {"parallel.context": legal, "parallel.context_method": ways})
