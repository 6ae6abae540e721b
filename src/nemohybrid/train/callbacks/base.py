"""The moments of a run at which something can be done beside training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from nemohybrid.train.evaluation import Evaluation
    from nemohybrid.train.step import StepResult
    from nemohybrid.train.trainer import Trainer


class Callback:
    """One concern, one file; a callback never reaches into another.

    Callbacks are called in the order of their list, on every rank; one that writes or prints is only put into the list of
    rank 0 (see `callbacks.standard`). All methods may be left out.
    """

    def on_run_start(self, trainer: Trainer) -> None:
        """Everything is built and loaded; `trainer.step` is where the run goes on from."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Step `trainer.step + 1` is about to run."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Weights are updated. What measures adds to `result.metrics`."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """The validation corpus was scored."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is safely on disk."""

    def on_run_end(self, trainer: Trainer) -> None:
        """The last step is done and saved. Not called when the run fails."""

    def on_close(self) -> None:
        """Release files and connections; always called last, also after a failure."""
