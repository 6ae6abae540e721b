"""How much memory the process takes."""

import psutil
import torch

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer

_GIB = 2**30


class Memory(Callback):
    """Resident memory of the process, and on a GPU the peak of what torch allocated and reserved, in GiB."""

    def __init__(self) -> None:
        self.process = psutil.Process()

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """At the end of this step (host), over the run (device)."""
        result.metrics["memory_host_gib"] = self.process.memory_info().rss / _GIB
        if trainer.context.device.type == "cuda":
            result.metrics["memory_device_gib"] = torch.cuda.max_memory_allocated() / _GIB
            result.metrics["memory_device_reserved_gib"] = torch.cuda.max_memory_reserved() / _GIB
