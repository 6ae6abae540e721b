"""The validation stream: every token of a held-out corpus predicted exactly once, and its bytes counted.

The documents are read in order as one line of N tokens. Token 0 has nothing before it and is never predicted; the
other N - 1 are each scored in one window. So the bytes scored are those of the text, less the bytes of token 0, and
    bits per byte = sum of the scored tokens' losses in nats / ln 2 / bytes scored.
An eod is scored and stands for no byte. Where a tokenizer puts something before every document (SentencePiece: a blank),
those bytes are not of the text and are taken off again.
"""

# B batch, L length
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemohybrid.data.corpus import Corpus
from nemohybrid.errors import DataError


class ValidationBatch(NamedTuple):
    """tokens, labels [B, L] int64, loss_mask [B, L] float32: 1 = label is scored; scored_bytes: of those labels."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    scored_bytes: int


class ValidationStream:
    """A whole corpus, or a part of one, as windows of `sequence_length` tokens.

    token_bytes: [vocab] of the corpus's tokenizer. overlap: tokens at the head of each window but the first that are
    context only, scored by the window before. eod: the id that ends a document. prefix_bytes: [vocab] bytes that the
    tokenizer put in front, in the first id of a document. Raises DataError when the corpus has fewer than two tokens,
    or holds ids outside the tokenizer's vocabulary.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        token_bytes: NDArray[np.int64],
        overlap: int = 0,
        *,
        eod: int | None = None,
        prefix_bytes: NDArray[np.int64] | None = None,
    ):
        if not 0 <= overlap < sequence_length:
            raise DataError(
                f"overlap {overlap} does not fit windows of {sequence_length}. Legal: 0 to {sequence_length - 1}"
            )
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.token_bytes = token_bytes
        self.overlap = overlap
        self.eod, self.prefix_bytes = eod, prefix_bytes
        tokens = corpus.num_tokens
        if tokens < 2:
            raise DataError(f"{corpus.prefix} has {tokens} tokens; to predict one, two are needed. Add text")

    def __len__(self) -> int:
        """Number of windows."""
        new_per_window = self.sequence_length - self.overlap
        return max(1, -(-(self.corpus.num_tokens - 1 - self.overlap) // new_per_window))

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ValidationBatch]:
        """This rank's share of the windows, `batch_size` rows at a time.

        Every rank gets the same number of batches, all of the same shape, so that collectives in the model line up;
        rows past the end are masked and score nothing.
        """
        for first in range(0, len(self), batch_size * world):
            start = first + rank * batch_size
            yield self.batch(range(start, start + batch_size))

    def batch(self, windows: Sequence[int]) -> ValidationBatch:
        """The given windows as tensors; one past the end is an empty, masked row."""
        rows = [self._window(window) for window in windows]
        samples = torch.from_numpy(np.stack([sample for sample, _ in rows]))
        loss_mask = torch.from_numpy(np.stack([mask for _, mask in rows]))
        tokens, labels = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        scored = loss_mask.bool()
        return ValidationBatch(tokens, labels, loss_mask, self._bytes(tokens[scored], labels[scored]))

    def _bytes(self, before: Tensor, labels: Tensor) -> int:
        """Of the text that `labels` [n] stand for, each after the token `before` it [n]."""
        text = int(self.token_bytes[labels.numpy()].sum())
        if self.eod is None or self.prefix_bytes is None:
            return text
        return text - int(self.prefix_bytes[labels[before.eq(self.eod)].numpy()].sum())

    def _window(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[L + 1] ids, padded with 0, and the [L] mask of the labels to score."""
        start = min(window * (self.sequence_length - self.overlap), self.corpus.num_tokens)
        ids = self.corpus.read(start, min(start + self.sequence_length + 1, self.corpus.num_tokens))
        outside = ids[(ids < 0) | (ids >= len(self.token_bytes))]
        if len(outside):
            raise DataError(
                f"{self.corpus.prefix} holds token id {outside[0]}; the tokenizer has {len(self.token_bytes)} ids"
            )
        sample = np.zeros(self.sequence_length + 1, dtype=np.int64)
        sample[: len(ids)] = ids
        mask = np.zeros(self.sequence_length, dtype=np.float32)
        mask[self.overlap if window else 0 : max(len(ids) - 1, 0)] = 1
        return sample, mask
