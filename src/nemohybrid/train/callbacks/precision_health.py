"""What is lost in quantizing, now and then: of each layer and tensor, in a file of its own, and summed up in the metrics."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from nemohybrid.precision.health import Health
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer

FILE = "precision_health.jsonl"


class PrecisionHealth(Callback):
    """In step 1 and every `every` steps, of the layers and tokens of this rank.

    The file has a line a step, `{"step": n, "<layer>.<tensor>/<figure>": value, ...}`, and where tensors held what is no finite
    number, `"not_finite": [their names]` in the order in which they were made: FP8 makes large numbers of infinite ones. The
    record of the step has `precision_<figure>/<tensor>`, the mean over layers, and `precision_<figure>_worst/<tensor>`, the
    largest.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_start(self, trainer: Trainer) -> None:
        """Look where it is time."""
        step = trainer.step + 1
        trainer.model.clock.watch = Health() if step == 1 or step % self.every == 0 else None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Add what was seen to the record of the step, and a line to the file."""
        watch, trainer.model.clock.watch = trainer.model.clock.watch, None
        if watch is None:
            return
        figures, broken = watch.figures(), [*dict.fromkeys(watch.broken())]
        if figures:
            line = {"step": result.step, **figures} | ({"not_finite": broken} if broken else {})
            with (Path(trainer.config.run.dir) / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        result.metrics |= summed_up(figures)


def summed_up(figures: dict[str, float]) -> dict[str, float]:
    """`<layer>.<tensor>/<figure>` -> the mean and the largest over layers, by figure and tensor."""
    of_layers: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, value in figures.items():
        place, figure = name.rsplit("/", 1)
        of_layers[figure, place.rsplit(".", 1)[1]].append(value)
    found: dict[str, float] = {}
    for (figure, tensor), values in of_layers.items():
        found |= {f"precision_{figure}/{tensor}": fmean(values), f"precision_{figure}_worst/{tensor}": max(values)}
    return found
