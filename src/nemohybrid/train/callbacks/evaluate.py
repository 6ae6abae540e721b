"""When to score the validation corpus."""

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.evaluation import evaluation_is_due
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class Evaluate(Callback):
    """Every `train.evaluate_every` steps, and after the last step of the schedule."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate when it is time."""
        if evaluation_is_due(trainer.config, result.step):
            trainer.evaluate()
