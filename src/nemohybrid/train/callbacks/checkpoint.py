"""When to save."""

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class Checkpoint(Callback):
    """Every `checkpoint.every` steps, and after the last step of this process: `train.stop_at`, `train.steps` or a signal."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Save when it is time."""
        due = self.every and result.step % self.every == 0
        if due or trainer.stopped_by or result.step == trainer.last_step:
            trainer.save()
