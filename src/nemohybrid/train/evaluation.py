"""Held-out loss, over the whole of every validation corpus."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nemohybrid.config.run_config import RunConfig
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


def evaluation_is_due(config: RunConfig, step: int) -> bool:
    """Every `train.evaluate_every` steps, and after the last step of the schedule."""
    every = config.train.evaluate_every
    return bool(every) and step > 0 and (step % every == 0 or step == config.train.steps)


@torch.no_grad()
def evaluate(
    model: HybridModel, data: RunData, batch_size: int, step: int, may_go_on: Callable[[], bool] = lambda: True
) -> Evaluation | None:
    """Score every validation token once, over all ranks; every rank returns the same numbers.

    `may_go_on` is asked before each batch, on all ranks equally often and with the same answer; None where it says no.
    """
    totals = torch.zeros(len(data.valid), 3, dtype=torch.float64)  # nats, tokens, bytes
    for row, name in enumerate(data.valid):
        for batch, scored_bytes in data.validation_batches(name, batch_size):
            if not may_go_on():
                return None
            nats, tokens = summed_loss(model, batch).item(), batch.loss_mask.sum().item()
            totals[row] += torch.tensor([nats, tokens, scored_bytes], dtype=torch.float64)
    totals = sum_over(totals.to(data.context.device), data.context.data).cpu()
    whole = _score(totals.sum(0))
    sets = {name: _score(row) for name, row in zip(data.valid, totals, strict=True) if name}
    return Evaluation(step, whole.val_loss, whole.val_bits_per_byte, sets)


def _score(totals: torch.Tensor) -> Score:
    nats, tokens, scored_bytes = totals.tolist()
    return Score(nats / tokens, nats / math.log(2) / scored_bytes if scored_bytes else math.nan)  # eods alone: no bytes
