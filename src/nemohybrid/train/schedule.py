"""The learning rate as a pure function of progress."""

import math

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.training import ScheduleSection


def learning_rate(config: RunConfig, plan: BatchPlan, step: int) -> float:
    """The rate of `step`, by what has been consumed including it (so that the first step is not wasted at zero)."""
    now, total = (plan.progress(s, config.schedule.unit) for s in (step, config.train.steps))
    factor = schedule_factor(config.schedule, now, config.schedule.total or total)
    return config.optim.lr * factor


def schedule_factor(schedule: ScheduleSection, now: float, total: float) -> float:
    """Share of the peak rate at progress `now` of `total`, between `min_lr_ratio` and 1 after the warmup.

    The decay shapes are those of Megatron-LM's optimizer_param_scheduler.py, with r the part of the decay gone by:
    linear 1-r, cosine (1+cos(pi r))/2, exponential 2 * 0.5^r - 1, minus_sqrt 1-sqrt(r).
    """
    warmup, decay = schedule.spans(total)
    if now < warmup:
        return now / warmup
    cosine = schedule.name == "cosine"
    start, length = (warmup, total - warmup) if cosine else (total - decay, decay)
    if schedule.name == "constant" or length <= 0:
        return 1.0
    r = min(1.0, max(0.0, (now - start) / length))
    low = schedule.min_lr_ratio
    return low + (1 - low) * DECAYS["cosine" if cosine else schedule.decay_style](r)


DECAYS = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2,
    "exponential": lambda r: 2 * 0.5**r - 1,
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
}
"""Shape of a decay: part of it gone by -> part of the rate left."""
