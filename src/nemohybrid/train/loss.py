"""Masked losses: of the next token, and of what the MTP depths draft after it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.model.stage import Stage
from nemohybrid.train.batch import Batch

# B batch, L length, T tokens = B*L, D hidden


def heads(
    model: HybridModel, batch: Batch, seq: SequenceContext, stage: Stage | None = None, x: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states [T, D], labels [B, L] and mask [B, L], for the next token and then for each MTP depth.

    One pass over the model, or over the last `stage` of it, which continues from `x`; the MTP part runs when the second head
    is asked for. With sequence parallelism hidden states are of this rank's tokens, labels and mask of all.
    """
    hidden = model.hidden_states(batch.tokens, seq, stage, x)
    yield hidden, batch.labels, batch.loss_mask
    if model.mtp_depth:
        drafts = model.mtp_hidden_states(hidden, batch.tokens, seq)
        for draft, (labels, mask) in zip(drafts, batch.draft_targets(model.mtp_depth), strict=True):
            yield draft, labels, mask


def stage_states(model: HybridModel, batch: Batch, share: float | None, stage: Stage, x: Tensor | None) -> Tensor:
    """What a stage that is not the last hands on, [T, D]."""
    return model.hidden_states(batch.tokens, batch.sequence(share), stage, x)


def summed_losses(
    model: HybridModel,
    batch: Batch,
    share: float | None = None,
    stage: Stage | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """[1 + MTP depths] fp32, nats: the cross-entropies of the next tokens that `batch.loss_mask` keeps, and of each depth's.

    `share`: what part of the global batch this is, in training only (see `SequenceContext`). `stage`, `x`: as of `heads`.

    Sums, not means: the trainer divides by the counts of the whole global batch, so that neither microbatches nor data
    ranks change the mathematics when they hold different numbers of unmasked tokens.

    For the backward pass every head keeps its logits; with `model.recompute` a model with MTP computes them again, and there
    are those of one head at a time.
    """
    seq = batch.sequence(share)
    again = model.recompute and model.mtp_depth > 0 and torch.is_grad_enabled()
    losses = [
        checkpoint(_summed, model, seq, *head, use_reentrant=False, preserve_rng_state=False)
        if again
        else _summed(model, seq, *head)
        for head in heads(model, batch, seq, stage, x)
    ]
    return torch.stack(losses)  # pyright: ignore[reportArgumentType]


def _summed(model: HybridModel, seq: SequenceContext, hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses = model.output.cross_entropy(hidden, labels.flatten(), seq)
    return (losses * mask.flatten()).sum()


def target_counts(batch: Batch, depths: int) -> Tensor:
    """[1 + depths] fp32: how many targets each sum of `summed_losses` has."""
    masks = [batch.loss_mask, *(mask for _, mask in batch.draft_targets(depths))]
    return torch.stack([mask.sum() for mask in masks])


def loss_weights(counts: Tensor, mtp_weight: float) -> Tensor:
    """[1 + depths]: the training loss is the sum of `summed_losses` times these.

    That is CE + mtp_weight / depths * (CE_1 + CE_2 + ...), each CE the mean over its own targets (Megatron-LM; Nemotron 3:
    0.3, Ultra 0.1). counts [1 + depths]: targets of the global batch. A depth without any adds nothing.
    """
    each = mtp_weight / max(1, len(counts) - 1)
    return torch.cat([1 / counts[:1], each * (counts[1:] > 0) / counts[1:].clamp(min=1)])
