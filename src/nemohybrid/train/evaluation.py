"""Held-out loss, over the whole validation corpus."""

import math
from dataclasses import dataclass

import torch

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.train.data import RunData
from nemohybrid.train.loss import summed_loss


@dataclass(frozen=True)
class Evaluation:
    """val_loss in nats a token; val_bits_per_byte does not depend on the tokenizer."""

    step: int
    val_loss: float
    val_bits_per_byte: float


@torch.no_grad()
def evaluate(model: HybridModel, data: RunData, batch_size: int, step: int) -> Evaluation:
    """Score every validation token once, over all ranks; every rank returns the same numbers."""
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for batch, scored_bytes in data.validation_batches(batch_size):
        totals += torch.tensor(
            [summed_loss(model, batch).item(), batch.loss_mask.sum().item(), scored_bytes], dtype=torch.float64
        )
    nats, tokens, scored = sum_over(totals.to(data.context.device), data.context.data).tolist()
    return Evaluation(step, nats / tokens, nats / math.log(2) / scored)
