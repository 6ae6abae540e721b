"""The endless samples of one corpus: sample k is a pure function of (corpus, sequence length, seed, k).

A stream knows nothing of steps, ranks or the length of the run, so a resumed, resized or prolonged run sees the same
samples in the same order. Epochs follow one another, each with a seed of its own.
"""

# B batch, L length
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.epoch import Epoch, samples_per_epoch


class Batch(NamedTuple):
    """tokens [B, L] int64, labels [B, L] int64 (the token after each), loss_mask [B, L] float32: 1 = counts."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


class SampleStream:
    """Endless samples of one corpus.

    sequence_length: tokens that a sample predicts. seed: any integer. cache_dir: a folder that all ranks share, for the
    order of each epoch (None: in memory). Raises DataError when the corpus is shorter than one sample.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, cache_dir: str | Path | None):
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        self.cache_dir = cache_dir
        self.samples_per_epoch = samples_per_epoch(corpus, sequence_length)
        self.epochs: dict[int, Epoch] = {}

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """[sequence_length + 1] the ids of sample `index` = 0, 1, 2, ... of the whole stream."""
        assert index >= 0, f"sample {index}"
        epoch, position = divmod(index, self.samples_per_epoch)
        return self._epoch(epoch)[position]

    def sequences_of(self, index: int) -> NDArray[np.int64]:
        """The entries of the corpus's index that sample `index` is made of, in order."""
        epoch, position = divmod(index, self.samples_per_epoch)
        return self._epoch(epoch).sequences_of(position)

    def is_ready(self, start: int, stop: int) -> bool:
        """Whether the samples `start` to `stop - 1` are of epochs whose order is at hand: else it must be made, or awaited."""
        size = self.samples_per_epoch
        return start >= stop or all(number in self.epochs for number in range(start // size, (stop - 1) // size + 1))

    def _epoch(self, number: int) -> Epoch:
        if number not in self.epochs:
            while len(self.epochs) >= 2:  # the one in use and its neighbour
                del self.epochs[next(iter(self.epochs))]
            seed = epoch_seed(self.seed, number)
            self.epochs[number] = Epoch(self.corpus, self.sequence_length, seed, self.cache_dir)
        return self.epochs[number]


def as_batch(samples: Sequence[NDArray[np.int64]]) -> Batch:
    """Samples of L + 1 ids as tensors; every label counts, the first token after an eod too."""
    stacked = torch.from_numpy(np.stack(samples))
    tokens, labels = stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()
    return Batch(tokens, labels, torch.ones(tokens.shape))


def corpus_seed(seed: int, position: int) -> int:
    """The seed of the corpus at a position of a blend. It follows neither name nor number of the corpora, and the first
    corpus has that of the run."""
    if position == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"seed {seed} corpus {position}".encode()).digest()[:8], "little")


def epoch_seed(seed: int, epoch: int) -> int:
    """megatron's seed, 0 to 2^32 - 1, of one epoch: the same everywhere, unrelated between epochs."""
    digest = hashlib.sha256(f"seed {seed} epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def document_ids(tokens: Tensor, eod: int) -> Tensor:
    """[B, L] int32: the number of the document of each token in its row, from 0. An eod belongs to the one it ends."""
    ends = tokens.eq(eod)
    return (ends.cumsum(dim=1) - ends.long()).to(torch.int32)
