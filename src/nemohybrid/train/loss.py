"""Masked next-token loss."""

from torch import Tensor

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.train.batch import Batch
from nemohybrid_kernels.cross_entropy import cross_entropy


def summed_loss(model: HybridModel, batch: Batch) -> Tensor:
    """Sum of the cross-entropies (nats, fp32 scalar) of the tokens that `batch.loss_mask` keeps.

    A sum, not a mean: the trainer divides by the count of the whole global batch, so that neither microbatches nor
    data ranks change the mathematics when they hold different numbers of unmasked tokens.
    """
    seq = SequenceContext(*batch.tokens.shape, document_ids=batch.document_ids)
    logits = model(batch.tokens, seq)
    losses = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    return (losses * batch.loss_mask.flatten()).sum()
