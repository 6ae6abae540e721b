"""Which rank the others wait for."""

import sys

from tqdm import tqdm

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class Stragglers(Callback):
    """Says what the watch has seen of slow ranks, between two steps and above a bar; on rank 0."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """slowest_rank, slowest_ratio: of the last window in which ranks were compared."""
        activity = trainer.activity
        while activity.seen:
            tqdm.write(f"step {result.step}: {activity.seen.popleft()}")
            sys.stdout.flush()  # else a file has it when a buffer is full, or never: a process may be killed
        if (slowest := activity.slowest) is not None:
            result.metrics |= {"slowest_rank": slowest.rank, "slowest_ratio": slowest.ratio}
