"""Held-out loss, over the whole of every validation corpus."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.train.data import RunData
from nemohybrid.train.loss import summed_loss


@dataclass(frozen=True)
class Score:
    """val_loss in nats a token; val_bits_per_byte does not depend on the tokenizer."""

    val_loss: float
    val_bits_per_byte: float

    def __str__(self) -> str:
        return f"loss {self.val_loss:.4f}, {self.val_bits_per_byte:.4f} bits per byte"


@dataclass(frozen=True)
class Evaluation:
    """The score of all validation sets as if they were one text, and that of each which has a name."""

    step: int
    val_loss: float
    val_bits_per_byte: float
    sets: dict[str, Score] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """In plain words: one line for all, one for each name."""
        width = max(map(len, self.sets), default=0)
        whole = Score(self.val_loss, self.val_bits_per_byte)
        return [f"validation {whole}", *(f"  {name:{width}}  {score}" for name, score in self.sets.items())]


def _nothing() -> None:
    """What happens between two batches unless told otherwise."""


@torch.no_grad()
def evaluate(
    model: HybridModel, data: RunData, batch_size: int, step: int, between: Callable[[], None] = _nothing
) -> Evaluation:
    """Score every validation token once, over all ranks; every rank returns the same numbers.

    `between` is called after each batch, on all ranks equally often.
    """
    totals = torch.zeros(len(data.valid), 3, dtype=torch.float64)  # nats, tokens, bytes
    for row, name in enumerate(data.valid):
        for batch, scored_bytes in data.validation_batches(name, batch_size):
            nats, tokens = summed_loss(model, batch).item(), batch.loss_mask.sum().item()
            totals[row] += torch.tensor([nats, tokens, scored_bytes], dtype=torch.float64)
            between()
    totals = sum_over(totals.to(data.context.device), data.context.data).cpu()
    whole = _score(totals.sum(0))
    sets = {name: _score(row) for name, row in zip(data.valid, totals, strict=True) if name}
    return Evaluation(step, whole.val_loss, whole.val_bits_per_byte, sets)


def _score(totals: torch.Tensor) -> Score:
    nats, tokens, scored_bytes = totals.tolist()
    return Score(nats / tokens, nats / math.log(2) / scored_bytes)
