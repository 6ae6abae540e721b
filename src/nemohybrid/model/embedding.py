"""Token ids in, logits out. Both have rows for padding ids, which no token uses and no logit shows."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model.init import normal
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.collectives import largest_over, sum_over
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.layout import ParamLayout, Piece, Shard, layout_of, parameter
from nemohybrid.parallel.tensor import TensorRanks, best_column, gathered_columns
from nemohybrid.precision.gemm import Gemm, plain_gemm
from nemohybrid_kernels.cross_entropy import linear_cross_entropy, rows_at_once


def padded_vocabulary(config: ModelConfig) -> int:
    """`vocab_size` rounded up to `vocab_multiple`."""
    return -(-(config.vocab_size or 0) // config.vocab_multiple) * config.vocab_multiple


class VocabularyMatrix(nn.Module):
    """[padded vocabulary, D], used as an embedding, as an output projection, or as both when they are tied.

    Each use, and with MTP there are several a token, multiplies by a cast of its own, and takes its gradient back to fp32
    before it is added to that of the others. One cast for all of them would add the gradients in bf16, where those of MTP,
    a twentieth of the main one, get lost: Nemotron 3 Ultra diverged of that.

    Tensor ranks share the rows, as equally as they divide; no rank ever holds all logits, but in `logits`. The loss need not
    hold those of all tokens either (`backend`), where the product is the plain one.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size or 0
        self.role = "vocabulary"
        self.gemm: Gemm = plain_gemm
        self.backend = "auto"  # of the loss
        shape = (padded_vocabulary(config), config.hidden_size)
        piece = Piece("", shape, normal(config.init_std), filled=self.vocab_size)
        self.weight = parameter(piece, shard=Shard(axis=0, even=False), context=context)
        self.whole_tokens = TensorRanks(context.tensor if context else Group())
        layout = layout_of(self.weight)
        if shape[0] < layout.ranks:
            raise ConfigError(f"a vocabulary of {shape[0]} rows cannot be shared by {layout.ranks} tensor ranks")
        firsts, counts = zip(*(self._rows(replace(layout, rank=rank)) for rank in range(layout.ranks)), strict=True)
        self.first, self.columns, self.columns_of_ranks = firsts[layout.rank], counts[layout.rank], list(counts)

    def _rows(self, layout: ParamLayout) -> tuple[int, int]:
        """Where the rows of a rank begin, and how many of them are no padding: its columns of the logits."""
        (box,) = layout.boxes
        return box.offsets[0], max(0, min(self.vocab_size - box.offsets[0], box.shape[0]))

    def embed(self, ids: Tensor, dtype: torch.dtype, seq: SequenceContext) -> Tensor:
        """ids [B, L] -> [T, D] in `dtype`, this rank's tokens of the stream."""
        ids = ids.flatten()
        if seq.ranks.group.size == 1:
            return F.embedding(ids, self.weight).to(dtype)
        here = ids - self.first
        others = (here < 0) | (here >= self.weight.shape[0])
        rows = F.embedding(here.masked_fill(others, 0), self.weight).to(dtype).masked_fill(others[:, None], 0.0)
        return seq.leave(rows)  # of each token all summands but one are zero: their sum is exact in any dtype

    def own_logits(self, x: Tensor) -> Tensor:
        """x [..., D], which has entered -> the logits of this rank's columns, [..., columns], in x's dtype."""
        return self.gemm(x, self.weight, None)[..., : self.columns]

    def logits(self, x: Tensor, seq: SequenceContext | None = None) -> Tensor:
        """x [T, D], this rank's tokens of the stream -> logits of all tokens, [T, vocab_size], in x's dtype.

        Without a `seq` every rank has all tokens, as in generation.
        """
        ranks = seq.ranks if seq is not None else self.whole_tokens
        return gathered_columns(self.own_logits(ranks.enter(x)), self.columns_of_ranks, ranks)

    def cross_entropy(self, x: Tensor, labels: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D], this rank's tokens; labels [T] of all tokens -> losses of all tokens [T], fp32, the same on every rank."""
        group = seq.ranks.group
        how = {"columns": self.columns, "first": self.first, "product": self.gemm, "backend": self._backend}
        if group.size > 1:
            how |= {"largest": partial(largest_over, group=group), "total": partial(sum_over, group=group)}
        return linear_cross_entropy(seq.enter(x), self.weight, labels, **how)

    @property
    def _backend(self) -> str:
        return self.backend if self.gemm is plain_gemm else "plain"

    def logits_at_once(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the logits that this rank's loss of `tokens` holds at a time."""
        most = rows_at_once(self.weight, tokens, dtype, self._backend)
        return most * self.weight.shape[0] * dtype.itemsize

    def most_likely(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D], this rank's tokens -> for all tokens the id with the largest logit, [T] int64. Not differentiable."""
        logits = self.own_logits(seq.enter(x))
        return best_column(logits, self.first, seq.ranks.group)
