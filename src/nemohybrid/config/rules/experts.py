"""Rules of expert parallelism: how the ranks of a pipeline stage share the experts."""

from nemohybrid.config.ranks import expert_tensor, folds, shard_ranks, token_ranks
from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, rule
from nemohybrid.config.violation import Violation


@rule(RUN_RULES)
def experts_to_share(now: Situation) -> Violation | None:
    """In a model without experts nothing would change."""
    parallel = now.config.parallel
    if now.has("E") or (parallel.expert == 1 and parallel.expert_tensor is None):
        return None
    where = f"parallel.expert={parallel.expert} parallel.expert_tensor={parallel.expert_tensor or 'null'}"
    legal = {"parallel.expert": "1", "parallel.expert_tensor": "null"}
    return Violation(where, "the pattern has no 'E' layer whose experts could be shared", legal)


@rule(RUN_RULES, "E")
def experts_over_ranks(now: Situation) -> Violation | None:
    """Expert ranks hold equally many experts."""
    experts, ranks = now.config.model.num_experts, now.config.parallel.expert
    if experts % ranks == 0:
        return None
    legal = {"parallel.expert": divisors(experts)}
    return Violation(f"parallel.expert={ranks}", f"{experts} experts cannot be shared by it", legal)


@rule(RUN_RULES, "E")
def width_of_experts_over_ranks(now: Situation) -> Violation | None:
    """Of an expert, ranks hold equal parts."""
    width, ranks = now.config.model.moe_ffn_hidden_size or 1, expert_tensor(now.config.parallel)
    if not folds(now.config.parallel) or width % ranks == 0:  # else the rule of tensor parallelism speaks
        return None
    legal = {"parallel.expert_tensor": [d for d in divisors(width) if d <= 2 * ranks]}
    return Violation(f"parallel.expert_tensor={ranks}", f"{width} channels of an expert cannot be shared by it", legal)


@rule(RUN_RULES, "E")
def experts_over_the_stage(now: Situation) -> Violation | None:
    """The ranks of a stage make whole sets of experts; where weights are cut, the ranks that cut them do."""
    parallel, width = now.config.parallel, expert_tensor(now.config.parallel)
    data, shard = token_ranks(now.config, now.world_size), shard_ranks(now.config, now.world_size)
    ranks = parallel.tensor * (shard if shard > 1 else data)
    if not folds(now.config.parallel) or ranks % (parallel.expert * width) == 0:
        return None
    where = f"parallel.expert={parallel.expert} x parallel.expert_tensor={width}"
    whose = "of a stage" if ranks == data * parallel.tensor else "that cut the weights"
    fitting = [d for d in divisors(ranks) if now.config.model.num_experts % d == 0 and ranks % (d * width) == 0]
    legal = {"parallel.expert": fitting} if fitting else {"parallel.expert_tensor": divisors(ranks)}
    return Violation(where, f"is no part of the {ranks} ranks {whose}", legal)


@rule(RUN_RULES, "E")
def tokens_of_folded_experts(now: Situation) -> Violation | None:
    """Every rank sends tokens of its own; without sequence parallelism tensor ranks would send the same ones."""
    parallel = now.config.parallel
    if not folds(now.config.parallel) or parallel.tensor == 1 or parallel.sequence:
        return None
    legal = {"parallel.sequence": "true", "parallel.expert": "1", "parallel.expert_tensor": "null"}
    message = f"experts that do not lie as the {parallel.tensor} tensor ranks do need tokens that these share"
    return Violation("parallel.sequence=false", message, legal)


@rule(RUN_RULES)
def exchange_of_folded_experts(now: Situation) -> Violation | None:
    """Where no rank lacks an expert, nothing is sent."""
    parallel = now.config.parallel
    asked = {"parallel.dispatcher": parallel.dispatcher, "parallel.expert_room": parallel.expert_room}
    asked = {key: value for key, value in asked.items() if value not in ("auto", None)}
    if not asked or (now.has("E") and folds(parallel)):
        return None
    where = " ".join(f"{key}={value}" for key, value in asked.items())
    legal = {key: "auto" if key.endswith("dispatcher") else "null" for key in asked} | {"parallel.expert": "2 or more"}
    return Violation(where, "changes nothing: no rank lacks an expert", legal)


@rule(RUN_RULES, "E")
def what_deepep_sends(now: Situation) -> Violation | None:
    """Its kernels know whole experts and bf16, and send what there is."""
    parallel, dtype = now.config.parallel, now.config.model.dtype
    if parallel.dispatcher != "deepep" or not folds(parallel):
        return None
    found = []
    if expert_tensor(parallel) > 1:
        found.append(("several ranks share the width of an expert", {"parallel.expert_tensor": "1"}))
    if dtype != "bfloat16":
        found.append((f"the model computes in {dtype}, it sends bfloat16", {"model.dtype": "bfloat16"}))
    if parallel.expert_room:
        found.append(("it sends what there is and needs no room", {"parallel.expert_room": "null"}))
    if not found:
        return None
    legal = {key: value for _, values in found for key, value in values.items()}
    message = f"cannot: {' and '.join(reason for reason, _ in found)}"
    return Violation("parallel.dispatcher=deepep", message, legal | {"parallel.dispatcher": "auto, all_to_all"})


@rule(RUN_RULES, "E")
def room_of_an_exchange(now: Situation) -> Violation | None:
    """Less than the mean would never do."""
    room = now.config.parallel.expert_room
    if room is None or room == 0 or room >= 1:
        return None
    legal = {"parallel.expert_room": "0 (as many rows as there are), 1 or more"}
    return Violation(f"parallel.expert_room={room:g}", "is less than the mean", legal)
