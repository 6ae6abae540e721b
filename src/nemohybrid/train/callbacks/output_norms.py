"""How large the outputs of the projections are, now and then."""

from nemohybrid.observe.output_norms import OutputNorms
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer

PREFIX = "output_norm/"
"""Of the lists in the record of a step; behind it stands the slot."""


class MeasureOutputNorms(Callback):
    """In step 1 and every `every` steps `output_norm/SLOT`, an RMS a layer, and `output_norm_max/SLOT`, the largest.

    The lists are for `metrics.jsonl`; trackers take numbers alone. Hooks hang on the model only while such a step runs. On
    every rank, since the ranks add up what they saw.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_run_start(self, trainer: Trainer) -> None:
        """Find the projections."""
        self.norms = OutputNorms(trainer.model)

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def on_step_start(self, trainer: Trainer) -> None:
        """Look where it is time."""
        if self._is_due(trainer.step + 1):
            self.norms.attach()

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Add what was seen to the record of the step."""
        if self._is_due(result.step):
            found = self.norms.read(trainer.context.data)
            result.metrics |= {f"{PREFIX}{slot}": values for slot, values in found.items()}
            result.metrics |= {f"output_norm_max/{slot}": max(values) for slot, values in found.items()}

    def on_close(self) -> None:
        """A step that failed left its hooks."""
        if hasattr(self, "norms"):
            self.norms.detach()
