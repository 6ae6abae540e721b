"""Rules between the model, the ranks and the layout they form; and what this version cannot lay out or train yet."""

from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, multiples_near, rule
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation
from nemohybrid.errors import ConfigError


def data_ranks(config: RunConfig, world_size: int) -> int:
    """Data-parallel ranks, with `auto` resolved."""
    others = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    return max(1, world_size // others) if config.parallel.data == "auto" else int(config.parallel.data)


@rule(RUN_RULES)
def data_is_a_number(now: Situation) -> Violation | None:
    """`parallel.data` is text so that it can say auto."""
    value = now.config.parallel.data
    if value == "auto" or (value.isdecimal() and int(value) > 0):
        return None
    now.config.parallel.data = "auto"  # the rules that follow need a number
    return Violation(f"parallel.data={value}", "must be auto or a number of ranks")


@rule(RUN_RULES)
def ranks_make_the_world(now: Situation) -> Violation | None:
    """data x tensor x pipeline x context = number of processes."""
    parallel, world = now.config.parallel, now.world_size
    others = parallel.tensor * parallel.pipeline * parallel.context
    if data_ranks(now.config, world) * others == world:
        return None
    shape = (
        f"data {parallel.data} x tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    )
    hint = f"start {others} processes or a multiple, e.g. torchrun --nproc-per-node {others}"
    if parallel.data != "auto":
        hint = f"start {others * int(parallel.data)} processes, or leave parallel.data=auto"
    return Violation("parallel", f"{shape} does not make the {world} process{'es' * (world > 1)} that run; {hint}")


@rule(RUN_RULES)
def layouts_of_this_version(now: Situation) -> Violation | None:
    """Data parallelism works; the other axes are refused rather than ignored."""
    parallel = now.config.parallel
    asked = [axis for axis in ("pipeline", "context", "expert") if getattr(parallel, axis) > 1]
    if not asked:
        return None
    where = " ".join(f"parallel.{axis}={getattr(parallel, axis)}" for axis in asked)
    legal = {f"parallel.{axis}": "1" for axis in asked}
    return Violation(where, "this version trains with data, tensor and sequence parallelism only", legal)


@rule(RUN_RULES, "M")
def mamba_over_tensor(now: Situation) -> Violation | None:
    """Mamba-2 is cut by groups, and its heads with them."""
    groups, ranks = now.config.model.mamba_num_groups, now.config.parallel.tensor
    if groups % ranks:
        where = f"parallel.tensor={ranks}"
        return Violation(where, f"{groups} Mamba groups cannot be shared by it", {"parallel.tensor": divisors(groups)})
    return None


@rule(RUN_RULES, "*")
def attention_over_tensor(now: Situation) -> Violation | None:
    """Query heads are cut; key/value heads are cut or repeated."""
    heads, groups, ranks = (
        now.config.model.num_attention_heads or 1,
        now.config.model.num_query_groups or 1,
        now.config.parallel.tensor,
    )
    legal = [d for d in divisors(heads) if groups % d == 0 or d % groups == 0]
    if ranks in legal:
        return None
    message = f"{heads} query and {groups} key/value heads cannot be shared by it"
    return Violation(f"parallel.tensor={ranks}", message, {"parallel.tensor": legal})


@rule(RUN_RULES)
def pipeline_stages(now: Situation) -> Violation | None:
    """The pattern must divide into stages: by its `|`, or evenly."""
    if now.pattern is None:
        return None
    try:
        now.pattern.stage_layers(now.config.parallel.pipeline)
    except ConfigError as error:
        return Violation(f"parallel.pipeline={now.config.parallel.pipeline}", str(error))
    return None


@rule(RUN_RULES, "E")
def experts_over_ranks(now: Situation) -> Violation | None:
    """Each expert lives on one rank of its group."""
    experts, ranks = now.config.model.num_experts, now.config.parallel.expert
    return (
        None
        if experts % ranks == 0
        else Violation(
            f"parallel.expert={ranks}",
            f"{experts} experts cannot be shared by it",
            {"parallel.expert": divisors(experts)},
        )
    )


@rule(RUN_RULES)
def sequence_over_context(now: Situation) -> Violation | None:
    """A sequence is cut in two pieces a rank, to balance causal attention."""
    length, ranks = now.config.data.sequence_length, now.config.parallel.context
    if ranks > 1 and length % (2 * ranks):
        where = f"data.sequence_length={length}"
        return Violation(
            where, f"does not cut into 2 x {ranks} pieces", {"data.sequence_length": multiples_near(length, 2 * ranks)}
        )
    return None
