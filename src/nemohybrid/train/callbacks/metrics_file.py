"""`metrics.jsonl`, the source of truth about a run."""

from pathlib import Path

from nemohybrid.observe.metrics import MetricsWriter, flat
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.evaluation import Evaluation
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class MetricsFile(Callback):
    """A line for every step and every evaluation. A step replayed after a crash is written again; the last line counts."""

    def on_run_start(self, trainer: Trainer) -> None:
        """Go on at the end of the file that is there."""
        self.writer = MetricsWriter(Path(trainer.config.run.dir) / "metrics.jsonl")

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Everything known of the step."""
        self.writer.write(flat(result))

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """step, val_loss, val_bits_per_byte, and val_loss/NAME, val_bits_per_byte/NAME of each set with a name."""
        self.writer.write(flat(evaluation))

    def on_close(self) -> None:
        """Nothing is buffered, so nothing can be lost; just close."""
        if hasattr(self, "writer"):
            self.writer.close()
