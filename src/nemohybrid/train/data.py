"""The tokens of a run: what its configuration names, opened, and cut into this rank's share of each batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.run_config import RunConfig
from nemohybrid.data.bundled import prepare_bundled
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.sampler import SampleStream, document_ids
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer
from nemohybrid.data.validation import ValidationStream
from nemohybrid.errors import DataError
from nemohybrid.parallel.collectives import wait_for_all
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.batch import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Prefixes of the corpora, and the tokenizer that made them."""

    train: Path
    valid: Path | None
    tokenizer: Tokenizer


class RunData:
    """Which sequences a step trains on depends on (seed, step) alone: not on ranks, microbatches or the run's length."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.plan = BatchPlan(config.train, config.data.sequence_length)
        cache = Path(config.data.cache or Path(config.run.dir) / "data")
        sources = on_main_first(context, lambda: find_sources(config, cache))
        self.tokenizer = sources.tokenizer
        self._check_vocabulary(sources)
        length, seed = config.data.sequence_length, config.run.seed
        self.train = on_main_first(context, lambda: SampleStream(sources.train, length, seed, cache / "index"))
        self.valid = self._validation(sources)
        info = self.train.corpus.info
        self.bytes_per_token = info.text_bytes / info.tokens if info else None

    def _check_vocabulary(self, sources: Sources) -> None:
        ids, rows = self.tokenizer.vocab_size, self.config.model.vocab_size or 0
        if ids > rows:
            raise DataError(f"the tokenizer has {ids} ids, the model {rows}. Set model.vocab_size={ids} or more")
        for prefix in (sources.train, sources.valid):
            if prefix is not None:
                Corpus(prefix).check_tokenizer(self.tokenizer)

    def _validation(self, sources: Sources) -> ValidationStream | None:
        if sources.valid is None:
            return None
        length, overlap = self.config.data.sequence_length, self.config.data.valid_overlap
        return ValidationStream(sources.valid, length, self.tokenizer.token_bytes(), overlap)

    def batch(self, step: int) -> Batch:
        """This rank's sequences of `step`, on its device. Rank r of n takes the r-th of n equal runs of the batch."""
        share = self.plan.batch_at(step) // self.context.data.size
        first = self.plan.samples_before(step) + share * self.context.data.rank
        tokens, labels, mask = self.train.batch(range(first, first + share))
        return self._on_device(tokens, labels, mask)

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """This rank's share of the validation windows, with the bytes of text each batch scores."""
        assert self.valid is not None
        data = self.context.data
        for tokens, labels, mask, scored_bytes in self.valid.batches(batch_size, data.rank, data.size):
            yield self._on_device(tokens, labels, mask), scored_bytes

    def _on_device(self, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> Batch:
        ids = document_ids(tokens, self.tokenizer.eod) if self.config.data.reset_documents else None
        if ids is not None and not ids.any():
            ids = None  # no border in any row: the cheaper path computes the same
        return Batch(tokens, labels, mask, ids).to(self.context.device)


def on_main_first(context: ParallelContext, action: Callable[[], T]) -> T:
    """Run `action` on rank 0, then on the others, which find its files ready."""
    if context.is_main:
        result = action()
        wait_for_all(context)
        return result
    wait_for_all(context)
    return action()


def find_sources(config: RunConfig, cache: Path) -> Sources:
    """The corpora of a configuration; the bundled text is prepared where it is not yet."""
    data = config.data
    if data.bundled:
        spec = data.tokenizer or "byte"
        folder = cache / f"{data.bundled}-{Path(spec).name.replace(':', '-')}"
        made = prepare_bundled(folder, spec)
        return Sources(made.train, made.valid, made.tokenizer)
    assert data.train is not None, "a rule checks that there is training data"
    train = Path(data.train)
    return Sources(train, Path(data.valid) if data.valid else None, _tokenizer(data.tokenizer, train))


def _tokenizer(spec: str | None, train: Path) -> Tokenizer:
    """The one named, or the one the corpus was made with: `byte`, or what `data prepare` left in PREFIX.tokenizer."""
    if spec:
        return load_tokenizer(spec)
    info = Corpus(train).info
    if info and info.tokenizer.get("type") == "byte":
        return load_tokenizer("byte")
    beside = Path(f"{train}.tokenizer")
    if beside.is_dir():
        return load_tokenizer(beside)
    raise DataError(f"no tokenizer is known for {train}; give data.tokenizer=byte or the path of its tokenizer.json")
