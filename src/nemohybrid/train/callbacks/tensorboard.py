"""TensorBoard events in <run.dir>/tensorboard."""

from pathlib import Path
from typing import Any

from nemohybrid.observe.metrics import scalars
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.evaluation import Evaluation
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class TensorBoard(Callback):
    """All numbers of `metrics.jsonl`, under the same names."""

    writer: Any = None

    def on_run_start(self, trainer: Trainer) -> None:
        """Events of steps that will be replayed are purged by TensorBoard itself."""
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(trainer.config.run.dir) / "tensorboard"
        self.writer = SummaryWriter(str(folder), purge_step=trainer.step + 1)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """One scalar a metric."""
        self._write(result.step, scalars(result))

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Beside the step that was just written."""
        self._write(evaluation.step, scalars(evaluation))

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_close(self) -> None:
        """Flush."""
        if self.writer is not None:
            self.writer.close()
