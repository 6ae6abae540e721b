"""How much each step consumes: a pure function of the step, so that progress needs no state of its own."""

import math
from dataclasses import dataclass

from nemohybrid.config.training import TrainSection


@dataclass(frozen=True)
class BatchPlan:
    """How many sequences each step takes. Steps count from 1; the ramp follows Megatron-LM's --rampup-batch-size."""

    train: TrainSection
    sequence_length: int

    def batch_at(self, step: int) -> int:
        """Sequences of the global batch of `step`."""
        return self._walk(step)[0]

    def samples_before(self, step: int) -> int:
        """Sequences consumed before `step`: the index of its first sample."""
        return self._walk(step)[1]

    def progress(self, step: int, unit: str) -> int:
        """Steps, samples or tokens consumed up to and including `step`."""
        if unit == "steps":
            return step
        return self.samples_before(step + 1) * (self.sequence_length if unit == "tokens" else 1)

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


def batch_sizes(train: TrainSection) -> range:
    """Every size that the global batch takes during a run."""
    start = train.batch_ramp.start or train.global_batch
    return range(start, train.global_batch + 1, train.batch_ramp.increment)
