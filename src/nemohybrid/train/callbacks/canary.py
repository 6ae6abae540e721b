"""Whether the fused kernels of the run can be trusted on this machine."""

from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.canary import check_kernels
from nemohybrid.train.trainer import Trainer


class KernelCanary(Callback):
    """Compares them with their twins before the first step, on every rank."""

    def on_run_start(self, trainer: Trainer) -> None:
        """Raises TrainingError on every rank where one is wrong on any."""
        context = trainer.context
        for line in check_kernels(trainer.model, trainer.config, context.device):
            if context.is_main:
                print(line, flush=True)
