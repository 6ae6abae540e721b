"""One optimizer step: microbatches, gradient sum over ranks, clipping, update."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.stage import Stage
from nemohybrid.parallel.collectives import largest_over, sum_over
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.data import DataRanks, Replicated
from nemohybrid.parallel.gradients import clip_gradients
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import loss_weights, stage_states, summed_losses, target_counts
from nemohybrid.train.passes import Passes
from nemohybrid.train.room import Attempts


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
    metrics: dict[str, float | list[float] | None] = field(default_factory=dict)


def compute_gradients(
    model: HybridModel, batch: Batch, microbatch: int, context: ParallelContext, shared: DataRanks | None = None
) -> torch.Tensor:
    """Leave the gradient of the training loss over the global batch in every `.grad` of `shared.parameters`.

    shared: how data ranks share the model; None: each holds all of it, and its own parameters get the gradients.

    Returns the mean losses [1 + MTP depths] fp32 over the global batch: of the next token, then of each depth; NaN for a
    depth that no row is long enough for. One backward pass a microbatch; gradients of all its losses add up in fp32.
    """
    counts = sum_over(target_counts(batch, model.mtp_depth), context.data)
    weights = loss_weights(counts, model.config.mtp.loss_weight)
    rows = batch.tokens.shape[0] * context.rows.size
    totals = torch.zeros_like(counts)
    shared = shared or Replicated(model, context)
    parts = list(batch.split(microbatch))

    def forward(stage: Stage, number: int, x: torch.Tensor | None) -> torch.Tensor:
        part, share = parts[number], parts[number].tokens.shape[0] / rows
        if not stage.is_last:
            return stage_states(model, part, share, stage, x)
        sums = summed_losses(model, part, share, stage, x)
        totals.add_(sums.detach())
        return (sums * weights).sum()

    passes, attempts = Passes(model, parts, context), Attempts(model, context)
    passes.train(forward, shared)
    while attempts.was_short(totals):
        totals.zero_()
        passes.train(forward, shared)
    shared.finish()
    return sum_over(sum_over(totals, context.data), context.pipeline) / counts  # the last stage alone has counted


def mtp_metrics(losses: Sequence[float]) -> dict[str, float | None]:
    """`mtp_loss/1`, `mtp_loss/2`, ...: mean loss of each MTP depth, nats; None where there was nothing to predict."""
    return {f"mtp_loss/{depth}": None if math.isnan(loss) else loss for depth, loss in enumerate(losses, 1)}


def update(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, clip: float | None, norm: torch.Tensor
) -> None:
    """Clip the gradients, whose norm is known to be `norm`, apply and clear them."""
    if clip is not None:
        clip_gradients(parameters, norm, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights_changed(model: HybridModel) -> None:
    """After an update: quantized weights are made anew, and delayed scaling takes up what it has seen. Collective."""
    model.clock.weights_changed()
    if model.precision is not None:
        model.precision.after_step(partial(largest_over, group=model.context.stage))
