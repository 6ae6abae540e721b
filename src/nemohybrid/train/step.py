"""One optimizer step: microbatches, gradient sum over ranks, clipping, update."""

from dataclasses import dataclass, field

import torch

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import clip_gradients, sum_gradients
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import summed_loss


@dataclass
class StepResult:
    """What one step did. Callbacks may add to `metrics`; those that write come after those that measure."""

    step: int
    loss: float  # mean over the unmasked tokens of the global batch, nats
    grad_norm: float  # before clipping
    lr: float
    batch: int  # sequences of the global batch
    tokens: int  # of the run so far, all ranks
    seconds: float
    metrics: dict[str, float | None] = field(default_factory=dict)


def compute_gradients(model: HybridModel, batch: Batch, microbatch: int, context: ParallelContext) -> torch.Tensor:
    """Leave the gradient of the mean loss over the global batch in every `.grad`; returns that loss (fp32 scalar)."""
    count = sum_over(batch.loss_mask.sum(), context.data)
    total = torch.zeros((), device=context.device)
    for part in batch.split(microbatch):
        loss = summed_loss(model, part) / count
        loss.backward()
        total += loss.detach()
    sum_gradients(model.parameters(), context.data)
    return sum_over(total, context.data)


def update(model: HybridModel, optimizer: torch.optim.Optimizer, clip: float | None, norm: torch.Tensor) -> None:
    """Clip the gradients, whose norm is known to be `norm`, apply and clear them."""
    if clip is not None:
        clip_gradients(model.parameters(), norm, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
