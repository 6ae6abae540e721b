"""The validation stream: every token of a held-out corpus predicted exactly once, and its bytes counted.

The documents are read in order as one line of N tokens. Token 0 has nothing before it and is never predicted; the
other N - 1 are each scored in one window. So the bytes scored are those of the text, less the bytes of token 0, and
    bits per byte = sum of the scored tokens' losses in nats / ln 2 / bytes scored.
An eod is scored and stands for no byte.
"""

# B batch, L length
from collections.abc import Iterator, Sequence
from pathlib import Path
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
    """A whole corpus as windows of `sequence_length` tokens.

    token_bytes: [vocab] of the corpus's tokenizer. overlap: tokens at the head of each window but the first that are
    context only, scored by the window before. Raises DataError when the corpus is damaged, has fewer than two tokens,
    or holds ids outside the tokenizer's vocabulary.
    """

    def __init__(self, prefix: str | Path, sequence_length: int, token_bytes: NDArray[np.int64], overlap: int = 0):
        if not 0 <= overlap < sequence_length:
            raise DataError(
                f"overlap {overlap} does not fit windows of {sequence_length}. Legal: 0 to {sequence_length - 1}"
            )
        self.corpus = Corpus(prefix)
        self.sequence_length = sequence_length
        self.token_bytes = token_bytes
        self.overlap = overlap
        if self.corpus.num_tokens < 2:
            raise DataError(f"{prefix} has {self.corpus.num_tokens} tokens; to predict one, two are needed. Add text")

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
        labels = samples[:, 1:].contiguous()
        scored_bytes = int(self.token_bytes[labels[loss_mask.bool()].numpy()].sum())
        return ValidationBatch(samples[:, :-1].contiguous(), labels, loss_mask, scored_bytes)

    def _window(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[L + 1] ids, padded with 0, and the [L] mask of the labels to score."""
        start = min(window * (self.sequence_length - self.overlap), self.corpus.num_tokens)
        ids = self.corpus.read(start, min(start + self.sequence_length + 1, self.corpus.num_tokens))
        if len(ids) and ids.max() >= len(self.token_bytes):
            raise DataError(
                f"{self.corpus.prefix} holds token id {ids.max()}; the tokenizer has {len(self.token_bytes)} ids"
            )
        sample = np.zeros(self.sequence_length + 1, dtype=np.int64)
        sample[: len(ids)] = ids
        mask = np.zeros(self.sequence_length, dtype=np.float32)
        mask[self.overlap if window else 0 : max(len(ids) - 1, 0)] = 1
        return sample, mask
