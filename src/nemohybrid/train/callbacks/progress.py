"""What a person watching sees: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.evaluation import Evaluation
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class Progress(Callback):
    """Loss, bits per byte, tokens per second and time left."""

    def __init__(self, style: str, every: int) -> None:
        self.style = ("bar" if _shows_a_bar() else "lines") if style == "auto" else style
        self.every = every
        self.bar: tqdm | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        """The clock for the time left starts here."""
        self.first, self.started = trainer.step, time.monotonic()
        if self.style == "bar":
            self.bar = tqdm(initial=trainer.step, total=trainer.last_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Move the bar, or print every few steps and the last."""
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(_facts(result)), refresh=False)
            self.bar.update()
        elif self.style == "lines" and (result.step % self.every == 0 or result.step in (1, trainer.last_step)):
            left = (time.monotonic() - self.started) / (result.step - self.first) * (trainer.last_step - result.step)
            width = len(str(trainer.last_step))
            print(
                f"step {result.step:{width}}/{trainer.last_step}",
                *_facts(result),
                f"eta {_clock(left)}",
                sep="  ",
                flush=True,
            )

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """One line, and one more for each set with a name."""
        self._say("\n".join([f"step {evaluation.step}: {evaluation.lines[0]}", *evaluation.lines[1:]]))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """One line."""
        self._say(f"saved {path}")

    def _say(self, text: str) -> None:
        if self.style != "quiet":
            tqdm.write(text)

    def on_run_end(self, trainer: Trainer) -> None:
        """Leave the bar as it stands, above what is printed next."""
        self.on_close()

    def on_close(self) -> None:
        """Also after a failure."""
        if self.bar is not None:
            self.bar.close()


def _shows_a_bar() -> bool:
    """A terminal that knows its height: in one of no size, as containers can have, tqdm shows nothing at all."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 1


def _facts(result: StepResult) -> list[str]:
    facts = [f"loss {result.loss:.3f}"]
    if (bits := result.metrics.get("bits_per_byte")) is not None:
        facts.append(f"bits/byte {bits:.3f}")
    if (violation := result.metrics.get("moe_max_violation_worst")) is not None:
        facts.append(f"maxvio {violation:.2f}")
    return [*facts, f"lr {result.lr:.2e}", f"{result.metrics.get('tokens_per_second') or 0:,.0f} tok/s"]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
