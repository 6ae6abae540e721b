"""How fast the run is, in tokens, in FLOP/s and as a share of the device's peak."""

import math

import torch

from nemohybrid.config.accounting import TRAINING_PASSES, total_cost
from nemohybrid.plan.hardware import peak_flops
from nemohybrid.train.callbacks.base import Callback
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer


class Throughput(Callback):
    """Tokens per second of the whole job; FLOP/s and MFU per device, exact and by Megatron's formula."""

    def on_run_start(self, trainer: Trainer) -> None:
        """Count once; only time is measured later."""
        config, device = trainer.config, trainer.context.device
        self.costs = {length: total_cost(config.model, length) for length in trainer.data.mixtures}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.peak = peak_flops(name, config.cluster.peak_tflops)
        self.bytes_per_token = trainer.data.bytes_per_token

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Of this step."""
        tokens = result.batch * trainer.config.data.sequence_length
        per_device = tokens / result.seconds / trainer.context.world_size
        cost = self.costs[trainer.data.lengths.at(result.step)]
        flops = TRAINING_PASSES * cost.flops * per_device
        result.metrics |= {
            "seconds": result.seconds,
            "tokens_per_second": tokens / result.seconds,
            "model_flops_per_second": flops,
            "model_flops_per_second_megatron": TRAINING_PASSES * cost.flops_megatron * per_device,
            "mfu": flops / self.peak if self.peak else None,
        }
        if self.bytes_per_token:
            result.metrics["bits_per_byte"] = result.loss / math.log(2) / self.bytes_per_token
