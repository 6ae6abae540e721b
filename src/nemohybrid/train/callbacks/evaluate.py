"""When to score the validation corpus."""

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class Evaluate(Callback):
    """Every `train.evaluate_every` steps, and after the last step of the schedule."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when it is time."""
        if result.step % self.every == 0 or result.step == trainer.config.train.steps:
            trainer.evaluate()
