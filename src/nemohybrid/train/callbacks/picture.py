"""The loss curve as a picture."""

from pathlib import Path

from nemohybrid.observe.metrics import read_metrics
from nemohybrid.observe.picture import draw_loss
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.trainer import Trainer


class Picture(Callback):
    """Draws <run.dir>/loss.png from `metrics.jsonl` when the run ends."""

    def on_run_end(self, trainer: Trainer) -> None:
        """The whole curve, over all restarts."""
        folder = Path(trainer.config.run.dir)
        draw_loss(read_metrics(folder / "metrics.jsonl"), folder / "loss.png", title=trainer.config.run.name)
