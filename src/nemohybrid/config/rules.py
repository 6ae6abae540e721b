"""Every rule that ties two keys together, in one file.

A rule looks at a typed, derived `RunConfig` and returns what is wrong, with the nearest values that would be right.
Nothing here imports torch or megatron: a wrong configuration is known within a second, before any process group.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.violation import Violation
from nemohybrid.errors import ConfigError
from nemohybrid.pattern import Pattern
from nemohybrid.symbols import parse_pattern


@dataclass(frozen=True)
class Situation:
    """What a rule may look at: the configuration, the number of ranks, and the parsed pattern (None when it is faulty)."""

    config: RunConfig
    world_size: int
    pattern: Pattern | None

    def has(self, symbol: str) -> bool:
        """Whether a layer of this symbol is built."""
        return symbol in (self.config.model.pattern if self.pattern is None else self.pattern.main + self.pattern.mtp)


Rule = Callable[[Situation], Violation | None]
MODEL_RULES: list[Rule] = []
RUN_RULES: list[Rule] = []


def rule(registry: list[Rule], symbol: str = "") -> Callable[[Rule], Rule]:
    """Register a rule; with `symbol`, it holds only where the pattern has such a layer."""

    def register(check: Rule) -> Rule:
        @wraps(check)
        def checked(now: Situation) -> Violation | None:
            return None if symbol and not now.has(symbol) else check(now)

        registry.append(checked)
        return checked

    return register


def violated_rules(config: RunConfig, world_size: int = 1, *, model_only: bool = False) -> list[Violation]:
    """All violations, in the order the rules are written. `model_only` leaves out what only a training run needs."""
    violations: list[Violation] = []
    pattern = None
    try:
        pattern = parse_pattern(config.model.pattern)
    except ConfigError as error:
        violations.append(Violation("model.pattern", str(error)))
    now = Situation(config, world_size, pattern)
    rules = MODEL_RULES if model_only else MODEL_RULES + RUN_RULES
    return violations + [found for check in rules if (found := check(now))]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def multiples_near(value: int, step: int) -> list[int]:
    """The multiples of `step` on both sides of `value`."""
    below = value // step * step
    return [m for m in (below, below + step) if m > 0]


def _divides(key: str, value: int, other_key: str, other: int, sentence: str) -> Violation | None:
    if value % other == 0:
        return None
    legal = {key: multiples_near(value, other), other_key: divisors(value)}
    return Violation(f"{key}={value}", sentence, legal)


# --- the model -------------------------------------------------------------------------------------------------------


@rule(MODEL_RULES, "M")
def mamba_heads_over_groups(now: Situation) -> Violation | None:
    """A head uses the B and C of its group."""
    heads, groups = now.config.model.mamba_num_heads or 1, now.config.model.mamba_num_groups
    return _divides(
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
    return _divides(
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


# --- the layout ------------------------------------------------------------------------------------------------------


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
    asked = [
        f"{axis}={size}"
        for axis in ("tensor", "pipeline", "context", "expert")
        if (size := getattr(parallel, axis)) > 1
    ]
    if not asked:
        return None
    return Violation("parallel." + ", ".join(asked), "this version trains with data parallelism only", {"each": "1"})


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


# --- what this version can train -------------------------------------------------------------------------------------


@rule(RUN_RULES)
def mtp_of_this_version(now: Situation) -> Violation | None:
    """The `/` part is parsed, counted and checked, and refused in training rather than dropped."""
    if now.pattern is None or not now.pattern.mtp:
        return None
    main = now.config.model.pattern.split("/")[0]
    return Violation(
        "model.pattern", "multi-token prediction (the part after /) cannot be trained yet", {"model.pattern": main}
    )


@rule(RUN_RULES, "E")
def latent_of_this_version(now: Situation) -> Violation | None:
    """LatentMoE is counted by `params`, and refused in training rather than dropped."""
    size = now.config.model.moe_latent_size
    return (
        Violation(f"model.moe_latent_size={size}", "LatentMoE cannot be trained yet", {"model.moe_latent_size": "null"})
        if size
        else None
    )


# --- batch and schedule ----------------------------------------------------------------------------------------------


@rule(RUN_RULES)
def batch_over_ranks(now: Situation) -> Violation | None:
    """The global batch is fixed; ranks and microbatches divide it."""
    train, ranks = now.config.train, data_ranks(now.config, now.world_size)
    if train.global_batch % ranks:
        return Violation(
            f"train.global_batch={train.global_batch}",
            f"cannot be shared by {ranks} data-parallel ranks",
            {"train.global_batch": multiples_near(train.global_batch, ranks)},
        )
    share = train.global_batch // ranks
    if train.microbatch and share % train.microbatch:
        message = f"does not divide the {share} sequences of a rank"
        return Violation(f"train.microbatch={train.microbatch}", message, {"train.microbatch": divisors(share)})
    return None


@rule(RUN_RULES)
def batch_ramp(now: Situation) -> Violation | None:
    """Every batch of the ramp divides over ranks and microbatches too."""
    train, ramp, ranks = now.config.train, now.config.train.batch_ramp, data_ranks(now.config, now.world_size)
    if ramp.start is None:
        return None
    unit = ranks * (train.microbatch or 1)
    for key, value in (("start", ramp.start), ("increment", ramp.increment)):
        if value % unit:
            where, near = f"train.batch_ramp.{key}", multiples_near(value, unit)
            return Violation(f"{where}={value}", f"must be a multiple of ranks x microbatch = {unit}", {where: near})
    if ramp.start > train.global_batch or (train.global_batch - ramp.start) % ramp.increment:
        where = f"train.batch_ramp.start={ramp.start}"
        return Violation(where, f"does not reach global_batch={train.global_batch} in steps of {ramp.increment}")
    return None


@rule(RUN_RULES)
def stop_within_steps(now: Situation) -> Violation | None:
    """A run can only stop where it goes."""
    stop, steps = now.config.train.stop_at, now.config.train.steps
    if stop is not None and not 0 < stop <= steps:
        return Violation(
            f"train.stop_at={stop}", f"is outside the {steps} steps of the run", {"train.stop_at": f"1 to {steps}"}
        )
    return None


@rule(RUN_RULES)
def schedule_fits(now: Situation) -> Violation | None:
    """Warmup and decay must fit into the run."""
    schedule, train = now.config.schedule, now.config.train
    plan = BatchPlan(train, now.config.data.sequence_length)
    total = schedule.total or plan.progress(train.steps, schedule.unit)
    decay = schedule.decay if schedule.name == "wsd" else 0
    if schedule.warmup + decay <= total:
        return None
    where = f"schedule.warmup={schedule.warmup}" + (f" + schedule.decay={decay}" if decay else "")
    return Violation(
        where,
        f"is longer than the {total} {schedule.unit} of the run",
        {"schedule.warmup": f"up to {max(0, total - decay)}"},
    )


@rule(RUN_RULES)
def clipping_leaves_something(now: Situation) -> Violation | None:
    """In other frameworks 0 means never; here it would scale every gradient to nothing."""
    if now.config.optim.clip_grad_norm != 0:
        return None
    return Violation(
        "optim.clip_grad_norm=0", "no gradient would be left", {"optim.clip_grad_norm": "null (never clip)"}
    )


@rule(RUN_RULES)
def betas_below_one(now: Situation) -> Violation | None:
    """A moment with beta 1 never learns anything."""
    for key in ("beta1", "beta2"):
        if getattr(now.config.optim, key) == 1:
            return Violation(f"optim.{key}=1.0", "never forgets, so never learns", {f"optim.{key}": "0 up to below 1"})
    return None


@rule(RUN_RULES)
def top_p_keeps_something(now: Situation) -> Violation | None:
    """Found here, not at the end of the run when the samples are drawn."""
    if now.config.sample.top_p > 0:
        return None
    return Violation("sample.top_p=0.0", "keeps no token to choose from", {"sample.top_p": "above 0 up to 1"})


# --- data and libraries ----------------------------------------------------------------------------------------------


@rule(RUN_RULES)
def training_data_exists(now: Situation) -> Violation | None:
    """Some corpus is named, and its files are there."""
    data = now.config.data
    if data.bundled:
        return Violation("data.train", "give either data.bundled or data.train, not both") if data.train else None
    if data.train is None:
        return Violation(
            "data.train", "no training data. Prepare some with `nemohybrid data prepare`, or take data=shakespeare"
        )
    return _corpus_problem("data.train", data.train)


@rule(RUN_RULES)
def validation_data_exists(now: Situation) -> Violation | None:
    """The same for the validation corpus, where one is named."""
    valid = now.config.data.valid
    return _corpus_problem("data.valid", valid) if valid else None


def _corpus_problem(key: str, prefix: str) -> Violation | None:
    missing = [prefix + end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
    if not missing:
        return None
    folder = Path(prefix).parent
    there = sorted(str(p.with_suffix("")) for p in folder.glob("*.idx")) if folder.is_dir() else []
    return Violation(f"{key}={prefix}", f"{' and '.join(missing)} not found", {key: there} if there else {})


@rule(RUN_RULES)
def evaluation_needs_data(now: Situation) -> Violation | None:
    """Asking for evaluation without validation data would never evaluate."""
    config = now.config
    if config.train.evaluate_every and not (config.data.valid or config.data.bundled):
        return Violation(
            "train.evaluate_every",
            "there is no validation data",
            {"data.valid": "a corpus prefix", "train.evaluate_every": "0"},
        )
    return None


@rule(RUN_RULES)
def overlap_in_window(now: Situation) -> Violation | None:
    """A validation window must score something."""
    overlap, length = now.config.data.valid_overlap, now.config.data.sequence_length
    if 0 <= overlap < length:
        return None
    return Violation(
        f"data.valid_overlap={overlap}",
        f"leaves nothing of a window of {length}",
        {"data.valid_overlap": f"0 to {length - 1}"},
    )


@rule(RUN_RULES)
def optimizer_is_installed(now: Situation) -> Violation | None:
    """The fused optimizers live in libraries of their own."""
    name = now.config.optim.name
    homes = {"apex_adamw": ("apex", IN_NGC), "te_adamw": ("transformer_engine", "pip install 'nemohybrid[te]'")}
    return _not_installed(f"optim.name={name}", *homes[name]) if name in homes else None


@rule(RUN_RULES)
def wandb_is_installed(now: Situation) -> Violation | None:
    """Weights & Biases is an extra."""
    asked = now.config.logging.wandb
    return _not_installed("logging.wandb=true", "wandb", "pip install 'nemohybrid[wandb]'") if asked else None


@rule(RUN_RULES)
def tensorboard_is_installed(now: Situation) -> Violation | None:
    """TensorBoard is an extra."""
    asked, cure = now.config.logging.tensorboard, "pip install 'nemohybrid[tensorboard]'"
    return _not_installed("logging.tensorboard=true", "tensorboard", cure) if asked else None


IN_NGC = "it comes with NGC containers and is not on PyPI (the package of that name there is another)"


def _not_installed(where: str, package: str, cure: str) -> Violation | None:
    if importlib.util.find_spec(package) is not None:
        return None
    return Violation(where, f"the package {package} is not installed: {cure}")


@rule(RUN_RULES)
def resume_exists(now: Situation) -> Violation | None:
    """`resume` is a word or a folder."""
    resume = now.config.resume
    if resume in ("auto", "never") or os.path.isdir(resume):  # noqa: PTH112 - a plain string
        return None
    return Violation(f"resume={resume}", "is neither auto, never, nor a checkpoint folder")
