"""Weights & Biases. One W&B run for one run folder, over any number of restarts."""

import netrc
import os
import secrets
from pathlib import Path
from typing import Any

from nemohybrid.observe.metrics import scalars
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.evaluation import Evaluation
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class WandB(Callback):
    """Logs with `train_step` as the x axis, so that replayed steps fall on themselves. Offline without a key."""

    run: Any = None

    def on_run_start(self, trainer: Trainer) -> None:
        """Resume the run whose id lies in the run folder, or start one and write its id there first."""
        import wandb

        folder = Path(trainer.config.run.dir)
        self.run = wandb.init(
            project=trainer.config.logging.wandb_project,
            name=trainer.config.run.name,
            id=run_id(folder / "wandb_run_id"),
            resume="allow",
            dir=str(folder),
            mode=mode(),
            config=trainer.config.as_dict(),
        )
        self.run.define_metric("*", step_metric="train_step")

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Everything in `metrics.jsonl`."""
        self.run.log({"train_step": result.step, **scalars(result)})

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> None:
        """At the same x as the step."""
        self.run.log({"train_step": evaluation.step, **scalars(evaluation)})

    def on_close(self) -> None:
        """Upload what is left."""
        if self.run is not None:
            self.run.finish()


def run_id(file: Path) -> str:
    """The id in `file`, which is written on first use."""
    if not file.is_file():
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()


def mode() -> str:
    """What WANDB_MODE says; without it, online only where there is a key."""
    has_key = os.environ.get("WANDB_API_KEY") or _key_in_netrc(Path.home() / ".netrc")
    return os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")


def _key_in_netrc(file: Path) -> bool:
    """Whether `wandb login` left a key there. Clusters keep a .netrc for other hosts too, and wandb would ask for a key."""
    try:
        return netrc.netrc(str(file)).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
