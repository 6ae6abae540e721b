"""The loss by position as a picture."""

from pathlib import Path

from nemohybrid.observe.position_loss import draw_position_loss
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.evaluation import Evaluation
from nemohybrid.train.trainer import Trainer


class PositionPicture(Callback):
    """Draws <run.dir>/position_loss.png of the first and the newest evaluation since the run began or was resumed."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[tuple[int, float, float]]] = {}

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """Look whether distant text has come to help."""
        points = [(score.last, score.loss, score.cumulative) for score in evaluation.positions]
        first = dict(list(self.drawn.items())[:1])
        self.drawn = first | {f"step {evaluation.step}": points}
        draw_position_loss(self.drawn, Path(trainer.config.run.dir) / "position_loss.png", trainer.config.run.name)
