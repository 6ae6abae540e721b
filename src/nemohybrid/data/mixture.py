"""What a run trains on: the samples of one or several corpora, blended by weight."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemohybrid.data.blend import Blend
from nemohybrid.data.corpus import Corpus, fingerprint
from nemohybrid.data.sampler import Batch, SampleStream, as_batch, corpus_seed
from nemohybrid.errors import DataError

MANY_EPOCHS = 4
"""Up to four epochs, repeated text is almost as good as new text (Muennighoff et al. 2023, arXiv 2305.16264)."""


class Mixture:
    """Endless samples of several corpora: sample i is a pure function of (corpora, weights, sequence length, seed, i).

    Each corpus has a stream and epochs of its own; a corpus alone is its stream. weights: one a corpus, positive, of
    any scale. Raises DataError for a corpus shorter than one sample.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        cache_dir: str | Path | None,
    ):
        self.blend = Blend(weights)
        self.sequence_length = sequence_length
        self.streams = [
            SampleStream(corpus, sequence_length, corpus_seed(seed, position), cache_dir)
            for position, corpus in enumerate(corpora)
        ]
        self.prints = [fingerprint(corpus.prefix) for corpus in corpora]  # of what is opened, not of what comes later

    def batch(self, start: int, stop: int, vocabulary: int) -> Batch:
        """The samples `start` to `stop - 1`. Raises DataError for an id that a model of `vocabulary` rows does not have."""
        positions = self.blend.positions(start, stop)
        samples = [self.streams[corpus][index] for corpus, index in positions]
        for (corpus, index), sample in zip(positions, samples, strict=True):
            if sample.min() < 0 or sample.max() >= vocabulary:
                self._refuse(self.streams[corpus], index, vocabulary)
        return as_batch(samples)

    def is_ready(self, start: int, stop: int) -> bool:
        """Whether the samples `start` to `stop - 1` can be read at once, as `SampleStream.is_ready` has it."""
        counts = zip(self.streams, self.blend.counts(start), self.blend.counts(stop), strict=True)
        return all(stream.is_ready(first, last) for stream, first, last in counts)

    def _refuse(self, stream: SampleStream, index: int, vocabulary: int) -> None:
        """Name the document that holds an id which does not fit."""
        for sequence in stream.sequences_of(index):
            document = stream.corpus.document_of(int(sequence))
            ids = stream.corpus.tokens(document)
            wrong = ids[(ids < 0) | (ids >= vocabulary)]
            if len(wrong):
                raise DataError(
                    f"{stream.corpus.prefix}, document {document}: token id {wrong[0]} is not one of the model. Legal: 0 to "
                    f"{vocabulary - 1}. Either the corpus was made with another tokenizer, or model.vocab_size is too small"
                )

    def check_batch(self, global_batch: int) -> None:
        """Raises DataError for a corpus that would have to give a sample twice to a single batch."""
        faults = [
            _too_short(stream, math.ceil(share * global_batch), int(stream.samples_per_epoch / share))
            for stream, share in zip(self.streams, self.blend.shares, strict=True)
            if stream.samples_per_epoch < math.ceil(share * global_batch)
        ]
        if faults:
            raise DataError("\n".join(faults))

    def describe(self, total: int) -> list[str]:
        """What the first `total` samples are made of, in plain words: one line, and in a blend one more a corpus."""
        takes = [
            f"{count:,} samples, {_epochs(count / stream.samples_per_epoch)}"
            for count, stream in zip(self.blend.counts(total), self.streams, strict=True)
        ]
        names = [stream.corpus.prefix for stream in self.streams]
        if len(names) == 1:
            return [f"training text: {names[0]}, {takes[0]}"]
        width = max(map(len, names))
        return [f"training text: {len(names)} corpora, {total:,} samples of {self.sequence_length:,} tokens"] + [
            f"  {float(share):7.2%}  {name:{width}}  {take}"
            for share, name, take in zip(self.blend.shares, names, takes, strict=True)
        ]

    def identity(self) -> list[dict[str, Any]]:
        """What decides which sample comes when, a table of JSON: neither paths nor times of the files are in it."""
        return [
            {
                "share": str(share),
                "documents": [stream.corpus.sequences.start, stream.corpus.sequences.stop],
                "tokens": stream.corpus.num_tokens,
                "fingerprint": print_,
            }
            for share, stream, print_ in zip(self.blend.shares, self.streams, self.prints, strict=True)
        ]

    @property
    def bytes_per_token(self) -> float | None:
        """Of text, averaged by share; None where some corpus does not say."""
        infos = [stream.corpus.info for stream in self.streams]
        pairs = zip(self.blend.shares, infos, strict=True)
        known = [float(share) * info.text_bytes / info.tokens for share, info in pairs if info is not None]
        return sum(known) if len(known) == len(infos) else None


def _too_short(stream: SampleStream, needed: int, batch: int) -> str:
    """What is missing, and what would be right."""
    tokens, length = stream.corpus.num_tokens, (stream.corpus.num_tokens - 1) // needed
    legal = [f"data.sequence_length up to {length:,}"] if length else []
    legal = [f"train.global_batch up to {batch:,}", *legal] if batch else legal
    return (
        f"{stream.corpus.prefix} is shorter than a batch: its {tokens:,} tokens are {stream.samples_per_epoch:,} samples "
        f"of sequence length {stream.sequence_length:,}, one batch takes {needed:,}. Add text"
        + "".join(f", or use {one}" for one in legal)
    )


def _epochs(number: float) -> str:
    many = f": each text comes more than {MANY_EPOCHS} times" if number > MANY_EPOCHS else ""
    return f"{number:.2f} epochs{many}"
