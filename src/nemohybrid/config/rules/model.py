"""Rules of the model alone: sizes that must divide, ends that must be in order."""

from nemohybrid.config.rules.rule import MODEL_RULES, Situation, divides, divisors, rule
from nemohybrid.config.violation import Violation


@rule(MODEL_RULES, "M")
def mamba_heads_over_groups(now: Situation) -> Violation | None:
    """A head uses the B and C of its group."""
    heads, groups = now.config.model.mamba_num_heads or 1, now.config.model.mamba_num_groups
    return divides(
        "model.mamba_num_heads",
        heads,
        "model.mamba_num_groups",
        groups,
        f"{heads} heads cannot form {groups} equal groups",
    )


@rule(MODEL_RULES, "M")
def dt_limits(now: Situation) -> Violation | None:
    """A clamp needs two ordered ends, an initial time step a non-empty range."""
    model = now.config.model
    if model.dt_limit is not None and (len(model.dt_limit) != 2 or not 0 <= model.dt_limit[0] < model.dt_limit[1]):
        return Violation(f"model.dt_limit={list(model.dt_limit)}", "needs [low, high] with 0 <= low < high")
    if not 0 < model.dt_min <= model.dt_max:
        return Violation(f"model.dt_min={model.dt_min}", f"needs 0 < dt_min <= dt_max={model.dt_max}")
    return None


@rule(MODEL_RULES, "*")
def query_heads_over_groups(now: Situation) -> Violation | None:
    """Query heads share key/value heads evenly."""
    heads, groups = now.config.model.num_attention_heads or 1, now.config.model.num_query_groups or 1
    return divides(
        "model.num_attention_heads",
        heads,
        "model.num_query_groups",
        groups,
        f"{heads} query heads cannot share {groups} key/value heads evenly",
    )


@rule(MODEL_RULES, "*")
def rope_needs_pairs(now: Situation) -> Violation | None:
    """Rotary embedding turns pairs of channels."""
    model = now.config.model
    if model.attention.position_embedding == "rope" and (model.head_dim or 0) % 2:
        head_dim = model.head_dim or 0
        return Violation(
            f"model.head_dim={head_dim}",
            "rope turns pairs of channels",
            {"model.head_dim": [head_dim - 1, head_dim + 1]},
        )
    return None


@rule(MODEL_RULES, "E")
def top_k_of_experts(now: Situation) -> Violation | None:
    """A token visits different experts."""
    model = now.config.model
    if model.router.top_groups > model.router.groups or model.router.groups > model.num_experts:
        return None  # the rule of router groups speaks
    reach = model.num_experts // model.router.groups * model.router.top_groups
    if model.moe_top_k > reach:
        return Violation(
            f"model.moe_top_k={model.moe_top_k}",
            f"only {reach} experts can be chosen from",
            {"model.moe_top_k": f"1 to {reach}"},
        )
    return None


@rule(MODEL_RULES, "E")
def one_expert_needs_its_score(now: Situation) -> Violation | None:
    """The weight of a single expert, normalised, is always 1: the router would get no gradient."""
    model = now.config.model
    if model.moe_top_k > 1 or not model.router.normalize:
        return None
    legal = {"model.router.normalize": "false", "model.moe_top_k": "2 or more"}
    return Violation("model.moe_top_k=1", "with normalised weights the router would not learn", legal)


@rule(MODEL_RULES, "E")
def router_groups(now: Situation) -> Violation | None:
    """Expert groups are equal, at least two experts each (a group's score is the sum of its best two)."""
    model, router = now.config.model, now.config.model.router
    if router.groups > 1 and (model.num_experts % router.groups or model.num_experts // router.groups < 2):
        legal = [d for d in divisors(model.num_experts) if model.num_experts // d >= 2]
        where = f"model.router.groups={router.groups}"
        return Violation(where, f"{model.num_experts} experts do not form such groups", {"model.router.groups": legal})
    if router.top_groups > router.groups:
        where = f"model.router.top_groups={router.top_groups}"
        return Violation(where, "more groups than there are", {"model.router.top_groups": f"1 to {router.groups}"})
    return None
