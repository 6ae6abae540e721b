"""Rules between the model, the ranks and the layout they form; and what this version cannot lay out or train yet."""

from nemohybrid.config.ranks import data_ranks, shard_ranks, token_ranks
from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, rule
from nemohybrid.config.violation import Violation
from nemohybrid.errors import ConfigError


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
def shards_and_their_copies(now: Situation) -> Violation | None:
    """hybrid means copies of a model that is cut over several data ranks; one copy or one part has a mode of its own."""
    parallel = now.config.parallel
    if parallel.data_mode != "hybrid":
        return None
    ranks, shard = token_ranks(now.config, now.world_size), shard_ranks(now.config, now.world_size)
    legal = {"parallel.data_shard": divisors(ranks)[1:-1], "parallel.data_mode": ["full_shard", "replicate"]}
    legal = {key: values for key, values in legal.items() if values}
    given = parallel.data_shard is not None
    where = f"parallel.data_shard={shard}" if given else "parallel.data_mode=hybrid"
    number = f"{ranks} data rank{'s' * (ranks > 1)}"
    if ranks % shard:
        whose = "" if given else ", as many as a node has"
        return Violation(where, f"{number} cannot be cut into parts of {shard}{whose}", legal)
    if not given and shard == 1 < ranks:
        return Violation(where, "a node has one data rank, so that nothing would be cut", legal)
    if given and shard in (1, ranks):
        same = "replicate" if shard == 1 else "full_shard"
        return Violation(where, f"with {number} it means parallel.data_mode={same}", legal)
    return None


@rule(RUN_RULES)
def data_shard_of_hybrid(now: Situation) -> Violation | None:
    """In another mode it would change nothing."""
    parallel = now.config.parallel
    if parallel.data_shard is None or parallel.data_mode == "hybrid":
        return None
    legal = {"parallel.data_shard": "null", "parallel.data_mode": "hybrid"}
    where = f"parallel.data_shard={parallel.data_shard}"
    return Violation(where, f"changes nothing with parallel.data_mode={parallel.data_mode}", legal)


@rule(RUN_RULES)
def reduction_of_shards(now: Situation) -> Violation | None:
    """Where every rank keeps whole gradients anyway, there is nothing to save by summing them more often."""
    parallel = now.config.parallel
    if not parallel.reduce_every_microbatch or parallel.data_mode != "replicate":
        return None
    legal = {"parallel.reduce_every_microbatch": "false", "parallel.data_mode": ["full_shard", "shard_grad", "hybrid"]}
    where = "parallel.reduce_every_microbatch=true"
    return Violation(where, "changes nothing with parallel.data_mode=replicate", legal)


@rule(RUN_RULES)
def pipeline_stages(now: Situation) -> Violation | None:
    """The `|` of the pattern make stages for every rank; without them every stage needs a layer."""
    if now.pattern is None:
        return None
    try:
        now.pattern.check_stages(now.config.parallel.pipeline)
    except ConfigError as error:
        return Violation(f"parallel.pipeline={now.config.parallel.pipeline}", str(error))
    return None
