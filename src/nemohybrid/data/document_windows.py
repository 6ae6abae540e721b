"""Validation documents each by itself, in the windows of lm-evaluation-harness (`loglikelihood_rolling`, context 1).

Every token of a document is predicted once; the first one from an eod, which is context only. Windows of L tokens follow
one another; each begins with the last token of the one before, and the last window of a document reaches back to be full.
An eod that ends a document is not scored. Bits per byte are then those that the harness calls `bits_per_byte`.
"""

# B batch, L length
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.tokenizer_base import Tokenizer
from nemohybrid.data.validation import ValidationBatch
from nemohybrid.errors import DataError


class CorpusDocuments(Sequence[NDArray[np.int64]]):
    """The documents of a corpus, or of a part of one, as arrays of ids without the eod that ends them."""

    def __init__(self, corpus: Corpus, eod: int) -> None:
        self.corpus, self.eod, self.total = corpus, eod, corpus.num_documents
        borders = corpus.dataset.document_indices[:-1]
        self.first = int(np.searchsorted(borders, corpus.sequences.start))

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> NDArray[np.int64]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < self.total:
            raise IndexError(index)
        ids = self.corpus.tokens(self.first + index)
        return ids[:-1] if len(ids) and ids[-1] == self.eod else ids


class DocumentWindows:
    """Documents as windows of `sequence_length` tokens, with the interface of `ValidationStream`.

    Raises DataError when no document has a token, or one has an id outside the tokenizer's vocabulary.
    """

    def __init__(self, documents: Sequence[NDArray[np.int64]], sequence_length: int, tokenizer: Tokenizer) -> None:
        self.documents, self.sequence_length, self.eod = documents, sequence_length, tokenizer.eod
        self.token_bytes, self.prefix_bytes = tokenizer.token_bytes(), tokenizer.prefix_bytes()
        self.windows = [(i, start) for i, ids in enumerate(documents) for start in range(0, len(ids), sequence_length)]
        if not self.windows:
            raise DataError("the validation documents have no tokens to predict. Add text")

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[ValidationBatch]:
        """This rank's share of the windows; as many batches of the same shape on every rank, rows past the end masked."""
        for first in range(0, len(self), batch_size * world):
            start = first + rank * batch_size
            yield self._batch(range(start, start + batch_size))

    def _batch(self, windows: Sequence[int]) -> ValidationBatch:
        tokens = np.zeros((len(windows), self.sequence_length), dtype=np.int64)
        labels, mask = tokens.copy(), tokens.astype(np.float32)
        scored_bytes = 0
        for row, window in enumerate(windows):
            if window < len(self):
                scored_bytes += self._fill(window, tokens[row], labels[row], mask[row])
        return ValidationBatch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask), scored_bytes)

    def _fill(
        self, window: int, tokens: NDArray[np.int64], labels: NDArray[np.int64], mask: NDArray[np.float32]
    ) -> int:
        """Write a window into rows of zeros [L]; the bytes of text that it scores."""
        document, scored_from = self.windows[window]
        ids = self.documents[document]
        self._check(ids, document)
        end = min(scored_from + self.sequence_length, len(ids))
        begin = max(0, end - self.sequence_length)
        line = np.concatenate([[self.eod], ids])
        length, new = end - begin, ids[scored_from:end]
        tokens[:length], labels[:length] = line[begin:end], ids[begin:end]
        mask[length - len(new) : length] = 1
        prefix = self.prefix_bytes[ids[0]] if scored_from == 0 else 0
        return int(self.token_bytes[new].sum() - prefix)

    def _check(self, ids: NDArray[np.int64], document: int) -> None:
        outside = ids[(ids < 0) | (ids >= len(self.token_bytes))]
        if len(outside):
            raise DataError(
                f"validation document {document} holds token id {outside[0]}; the tokenizer has {len(self.token_bytes)} ids"
            )
