"""The learning rate as a pure function of progress, and progress as a pure function of the step."""

import math
from dataclasses import dataclass

from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.training import ScheduleSection, TrainSection


@dataclass(frozen=True)
class BatchPlan:
    """How many sequences each step takes. Steps count from 1; the ramp follows Megatron-LM's --rampup-batch-size."""

    train: TrainSection

    def batch_at(self, step: int) -> int:
        """Sequences of the global batch of `step`."""
        return self._walk(step)[0]

    def samples_before(self, step: int) -> int:
        """Sequences consumed before `step`: the index of its first sample."""
        return self._walk(step)[1]

    def _walk(self, step: int) -> tuple[int, int]:
        """(batch of the step, samples before it), one ramp level at a time."""
        ramp, full = self.train.batch_ramp, self.train.global_batch
        done, samples, batch = 0, 0, ramp.start or full
        levels = (full - batch) // ramp.increment if batch < full else 0
        per_level = ramp.samples / levels if levels else 0.0
        for level in range(levels):
            target = (level + 1) * per_level
            steps = max(0, math.ceil((target - samples) / batch))
            if done + steps >= step:
                break
            done, samples, batch = done + steps, samples + steps * batch, batch + ramp.increment
        return batch, samples + (step - 1 - done) * batch


def learning_rate(config: RunConfig, plan: BatchPlan, step: int) -> float:
    """The rate of `step`, by what has been consumed including it (so that the first step is not wasted at zero)."""
    now, total = (_progress(config, plan, s) for s in (step, config.train.steps))
    factor = schedule_factor(config.schedule, now, config.schedule.total or total)
    return config.optim.lr * factor


def _progress(config: RunConfig, plan: BatchPlan, step: int) -> int:
    """Steps, samples or tokens up to and including `step`."""
    if config.schedule.unit == "steps":
        return step
    samples = plan.samples_before(step + 1)
    return samples * (config.data.sequence_length if config.schedule.unit == "tokens" else 1)


def schedule_factor(schedule: ScheduleSection, now: float, total: float) -> float:
    """Share of the peak rate at progress `now` of `total`, between `min_lr_ratio` and 1 after the warmup.

    The decay shapes are those of Megatron-LM's optimizer_param_scheduler.py, with r the part of the decay gone by:
    linear 1-r, cosine (1+cos(pi r))/2, exponential 2 * 0.5^r - 1, minus_sqrt 1-sqrt(r).
    """
    if now < schedule.warmup:
        return now / schedule.warmup
    cosine = schedule.name == "cosine"
    start, length = (schedule.warmup, total - schedule.warmup) if cosine else (total - schedule.decay, schedule.decay)
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
