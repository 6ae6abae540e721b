"""Held-out loss and accepted drafts, over the whole of every validation corpus."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.stage import Stage
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.context_parallel.moves import shifted
from nemohybrid.train.batch import Batch
from nemohybrid.train.data import RunData
from nemohybrid.train.loss import heads, stage_states
from nemohybrid.train.passes import Passes
from nemohybrid.train.position_loss import PositionLosses, PositionScore

T = TypeVar("T")
IN_A_ROW = 8
"""Batches for each rank of a pipeline that pass it before it runs empty."""


@dataclass(frozen=True)
class Score:
    """val_loss in nats a token; val_bits_per_byte does not depend on the tokenizer.

    mtp_acceptance: for each MTP depth the share of its targets at which its greedy draft is the token that the model itself
    would choose after the true text, and so are all shallower drafts from the same position.
    """

    val_loss: float
    val_bits_per_byte: float
    mtp_acceptance: tuple[float, ...] = ()

    def __str__(self) -> str:
        loss = f"loss {self.val_loss:.4f}, {self.val_bits_per_byte:.4f} bits per byte"
        return loss + "".join(
            f"{', drafts accepted' if depth == 0 else ''} {share:.1%}"
            for depth, share in enumerate(self.mtp_acceptance)
        )


@dataclass(frozen=True)
class Evaluation:
    """The score of all validation sets as if they were one text, and that of each which has a name; by position, where that
    was asked for."""

    step: int
    val_loss: float
    val_bits_per_byte: float
    sets: dict[str, Score] = field(default_factory=dict)
    mtp_acceptance: tuple[float, ...] = ()
    positions: tuple[PositionScore, ...] = ()

    @property
    def lines(self) -> list[str]:
        """In plain words: one line for all, one for each name."""
        width = max(map(len, self.sets), default=0)
        whole = Score(self.val_loss, self.val_bits_per_byte, self.mtp_acceptance)
        return [f"validation {whole}", *(f"  {name:{width}}  {score}" for name, score in self.sets.items())]


def evaluation_is_due(config: RunConfig, step: int) -> bool:
    """Every `train.evaluate_every` steps, and after the last step of the schedule."""
    every = config.train.evaluate_every
    return bool(every) and step > 0 and (step % every == 0 or step == config.train.steps)


@torch.no_grad()
def evaluate(
    model: HybridModel,
    data: RunData,
    batch_size: int,
    step: int,
    may_go_on: Callable[[], bool] = lambda: True,
    positions: bool = False,
) -> Evaluation | None:
    """Score every validation token once, over all ranks; every rank returns the same numbers.

    `may_go_on` is asked before each batch, in a pipeline before those that pass it one behind the other, on all ranks
    equally often and with the same answer; None where it says no. positions: whether to score by them too.
    """
    context = data.context
    together = 1 if context.pipeline.size == 1 else IN_A_ROW * context.pipeline.size
    by_position = PositionLosses(data.config.data.sequence_length, context.device) if positions else None
    totals = torch.zeros(len(data.valid), 3 + 2 * model.mtp_depth, dtype=torch.float64)
    for row, name in enumerate(data.valid):
        for batches in _in_groups(data.validation_batches(name, batch_size), together):
            if not may_go_on():
                return None
            scores = score_batches(model, [batch for batch, _ in batches], context, by_position)
            scored_bytes = (
                sum(count for _, count in batches) if context.pipeline.rank == context.context.rank == 0 else 0
            )
            totals[row] += torch.tensor([scored_bytes, *scores.tolist()], dtype=torch.float64)
    totals = sum_over(sum_over(totals.to(context.device), context.data), context.pipeline).cpu()
    whole = _score(totals.sum(0))
    sets = {name: _score(row) for name, row in zip(data.valid, totals, strict=True) if name}
    found = tuple(by_position.scores(context)) if by_position else ()
    return Evaluation(step, whole.val_loss, whole.val_bits_per_byte, sets, whole.mtp_acceptance, found)


def _in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`size` at a time; the last group may have fewer."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def score_batches(
    model: HybridModel, batches: Sequence[Batch], context: ParallelContext, positions: PositionLosses | None = None
) -> Tensor:
    """[2 + 2 x MTP depths], fp64: the sums of `score_batch` over batches that pass the pipeline one behind the other.

    Zeros on ranks without the last stage. Collective over the pipeline.
    """
    totals = torch.zeros(2 + 2 * model.mtp_depth, dtype=torch.float64, device=context.device)

    def forward(stage: Stage, number: int, x: Tensor | None) -> Tensor:
        batch = batches[number]
        if not stage.is_last:
            return stage_states(model, batch, None, stage, x)
        totals.add_(score_batch(model, batch, stage, x, positions))
        return totals

    Passes(model, batches, context).evaluate(forward)
    return totals


def score_batch(
    model: HybridModel,
    batch: Batch,
    stage: Stage | None = None,
    x: Tensor | None = None,
    positions: PositionLosses | None = None,
) -> Tensor:
    """[2 + 2 x MTP depths]: nats and number of the scored tokens, then accepted drafts and targets of each depth.

    Position t of depth k drafts token t + k + 2 and has read the true ones before it, as the model has that chooses the
    token at position t + k + 1. `stage`, `x`: as of `train.loss.heads`.
    """
    seq = batch.sequence()
    (hidden, labels, mask), *drafts = heads(model, batch, seq, stage, x)
    losses = model.output.cross_entropy(hidden, labels.flatten(), seq).view_as(mask)
    if positions is not None:
        positions.add(losses, mask, seq.positions(losses.device))
    chosen = model.output.most_likely(hidden, seq).view_as(labels) if drafts else labels
    sums, accepted = [(losses * mask).sum(), mask.sum()], torch.ones_like(mask)
    for by, (draft, _, counted) in enumerate(drafts, 1):
        agrees = model.output.most_likely(draft, seq).view_as(labels) == shifted(chosen, by, batch.context)
        accepted = accepted * agrees
        sums += [(accepted * counted).sum(), counted.sum()]
    return torch.stack(sums)


def _score(totals: Tensor) -> Score:
    scored_bytes, nats, tokens, *drafts = totals.tolist()
    bits = nats / math.log(2) / scored_bytes if scored_bytes else math.nan  # eods alone: no bytes
    acceptance = (hits / of if of else math.nan for hits, of in zip(drafts[::2], drafts[1::2], strict=True))
    return Score(nats / tokens, bits, tuple(acceptance))
