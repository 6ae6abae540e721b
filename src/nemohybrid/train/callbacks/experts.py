"""Which expert got how much, layer by layer."""

import json
from pathlib import Path

import torch

from nemohybrid.observe.expert_map import draw_expert_map
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class ExpertMap(Callback):
    """Every so many steps `<run.dir>/expert_load/step_N.png`, and `.json` with the loads summed since the last map.

    The sum stays on the device until then. What was summed before a restart is lost: `steps` in the file says how many count.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_run_start(self, trainer: Trainer) -> None:
        """Nothing is summed yet."""
        self.steps, self.loads = 0, torch.zeros_like(trainer.balance.loads, device=trainer.context.device)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Add the step; draw when it is time."""
        self.loads += trainer.balance.loads
        self.steps += 1
        if result.step % self.every == 0 and trainer.balance.names:
            self._write(trainer, result.step)
            self.on_run_start(trainer)

    def _write(self, trainer: Trainer, step: int) -> None:
        folder = Path(trainer.config.run.dir) / "expert_load"
        folder.mkdir(exist_ok=True)
        loads = [[round(visits) for visits in row] for row in self.loads.tolist()]
        record = {"step": step, "steps": self.steps, "layers": trainer.balance.names, "loads": loads}
        (folder / f"step_{step:06d}.json").write_text(json.dumps(record) + "\n")
        title = f"{trainer.config.run.name}: steps {step - self.steps + 1} to {step}"
        draw_expert_map(trainer.balance.names, loads, folder / f"step_{step:06d}.png", title)
