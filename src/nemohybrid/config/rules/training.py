"""Rules of batch, schedule and optimizer."""

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.ranks import data_ranks
from nemohybrid.config.rules.rule import RUN_RULES, Situation, divisors, multiples_near, rule
from nemohybrid.config.violation import Violation


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
    warmup, decay = schedule.spans(total)
    if warmup + decay <= total:
        return None
    where = f"schedule.warmup={schedule.warmup:g}" + (f" + schedule.decay={schedule.decay:g}" if decay else "")
    legal = {"schedule.warmup": f"up to {max(0, total - decay):g}"}
    if decay > total:
        legal = {"schedule.decay": f"up to {total - min(warmup, total):g}, or a share below 1 such as 0.5"}
    return Violation(where, f"is longer than the {total} {schedule.unit} of the run", legal)


@rule(RUN_RULES)
def rows_long_enough_to_draft(now: Situation) -> Violation | None:
    """A row of L tokens has L - d targets for the d-th MTP depth."""
    depth, length = now.pattern.mtp_depth if now.pattern else 0, now.config.data.sequence_length
    if length > depth:
        return None
    where = f"data.sequence_length={length}"
    return Violation(
        where, f"MTP depth {depth} has nothing to predict", {"data.sequence_length": f"{depth + 1} or more"}
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
