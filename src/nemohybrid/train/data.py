"""The tokens of a run: what its configuration names, opened, and cut into this rank's share of each batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.lengths import LengthPlan
from nemohybrid.config.run_config import RunConfig
from nemohybrid.data.bundled import prepare_bundled
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.document_windows import CorpusDocuments, DocumentWindows
from nemohybrid.data.mixture import Mixture
from nemohybrid.data.sampler import document_ids
from nemohybrid.data.split import split_corpora
from nemohybrid.data.tokenizer import Tokenizer, load_tokenizer
from nemohybrid.data.validation import ValidationStream
from nemohybrid.errors import DataError
from nemohybrid.parallel.collectives import wait_for_all
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.batch import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Training corpora with their weights, validation corpora by name ("": the only one), and the tokenizer of all."""

    train: list[Corpus]
    weights: list[float]
    valid: dict[str, Corpus]
    tokenizer: Tokenizer


class RunData:
    """Which sequences a step trains on depends on (seed, step) alone: not on ranks, microbatches or the run's length.

    Raises DataError for corpora that are damaged, too short, or not of the run's tokenizer.
    """

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.plan = BatchPlan(config.train, config.data.sequence_length)
        cache = Path(config.data.cache or Path(config.run.dir) / "data")
        sources = on_main_first(context, lambda: find_sources(config, cache))
        self.tokenizer = sources.tokenizer
        self._check_vocabulary(sources)
        length, seed = config.data.sequence_length, config.run.seed
        self.lengths = LengthPlan.of(config.data)
        self.mixtures = {
            own: Mixture(sources.train, sources.weights, own, seed, cache / "index") for own, _ in self.lengths.lengths
        }
        for own, mixture in self.mixtures.items():
            mixture.check_batch(config.train.global_batch * (length // own))
        self.train = self.mixtures[length]
        self.valid = {name: self._validation(corpus) for name, corpus in sources.valid.items()}
        self.bytes_per_token = self.train.bytes_per_token

    def _check_vocabulary(self, sources: Sources) -> None:
        ids, rows = self.tokenizer.vocab_size, self.config.model.vocab_size or 0
        if ids > rows:
            raise DataError(f"the tokenizer has {ids} ids, the model {rows}. Set model.vocab_size={ids} or more")
        for corpus in [*sources.train, *sources.valid.values()]:
            corpus.check_tokenizer(self.tokenizer)

    def _validation(self, corpus: Corpus) -> ValidationStream | DocumentWindows:
        length, overlap, tokenizer = self.config.data.sequence_length, self.config.data.valid_overlap, self.tokenizer
        if self.config.data.valid_windows == "documents":
            return DocumentWindows(CorpusDocuments(corpus, tokenizer.eod), length, tokenizer)
        return ValidationStream(
            corpus, length, tokenizer.token_bytes(), overlap, eod=tokenizer.eod, prefix_bytes=tokenizer.prefix_bytes()
        )

    def identity(self) -> dict[str, Any]:
        """What must be the same in the run folder's checkpoints: corpora, their order and shares, and lengths. JSON."""
        lengths = {str(length): str(share) for length, share in self.lengths.lengths}
        several = {"data.lengths": lengths} if len(lengths) > 1 else {}
        return {"data.corpora": self.train.identity()} | several

    def describe(self, total_samples: int) -> list[str]:
        """What the first `total_samples` sequences of the run are made of, in plain words; as if all were of the longest."""
        lines = [
            f"{float(share):7.2%} of the steps and of the tokens in sequences of {n:,}"
            for n, share in self.lengths.lengths
        ]
        return self.train.describe(total_samples) + (lines if len(lines) > 1 else [])

    def short_rows(self, step: int) -> int:
        """How many sequences of `step` take the place of one of `data.sequence_length` tokens."""
        return self.config.data.sequence_length // self.lengths.at(step)

    def batch(self, step: int) -> Batch:
        """This rank's sequences of `step`, on its device. Rank r of n takes the r-th of n equal runs of the batch; where ranks
        share rows, their tokens.

        Raises DataError for a token id that the model does not have.
        """
        mixture, samples = self.mixtures[self.lengths.at(step)], self._samples_of(step)
        tokens, labels, mask = mixture.batch(samples.start, samples.stop, self.config.model.vocab_size or 0)
        return self._on_device(tokens, labels, mask)

    def is_ready(self, step: int) -> bool:
        """Whether no epoch begins in `step` whose order must first be made, by this rank or by another."""
        samples = self._samples_of(step)
        return self.mixtures[self.lengths.at(step)].is_ready(samples.start, samples.stop)

    def _samples_of(self, step: int) -> range:
        """The numbers of this rank's sequences of `step` among those of their length."""
        rows, length = self.context.rows, self.lengths.at(step)
        batch = self.plan.batch_at(step) * self.short_rows(step)
        share = batch // rows.size
        first = self._first_of(step, length, batch) + share * rows.rank
        return range(first, first + share)

    def _first_of(self, step: int, length: int, batch: int) -> int:
        """The number of the step's first sequence among those of its length. A batch that grows has one length."""
        if len(self.mixtures) == 1:
            return self.plan.samples_before(step)
        return self.lengths.steps_before(step, length) * batch

    def validation_batches(self, name: str, batch_size: int) -> Iterator[tuple[Batch, int]]:
        """This rank's share of the windows of one validation set, with the bytes of text each batch scores."""
        data = self.context.rows
        in_line = self.config.data.valid_windows == "stream"  # else the eod in front is context of its document
        for tokens, labels, mask, scored_bytes in self.valid[name].batches(batch_size, data.rank, data.size):
            yield self._on_device(tokens, labels, mask, in_line), scored_bytes

    def _on_device(self, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, several: bool = True) -> Batch:
        """several: a row may hold more documents than one."""
        eod = self.tokenizer.eod if several and self.config.data.reset_documents else None
        ids = None if eod is None else document_ids(tokens, eod)
        if ids is not None and not ids.any():
            ids = None  # no border in any row: the cheaper path computes the same
        return Batch(tokens, labels, mask, ids, eod).shared_by(self.context.context).to(self.context.device)


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
        return Sources([Corpus(made.train)], [1.0], {"": Corpus(made.valid)}, made.tokenizer)
    prefixes = list(data.corpora)
    assert prefixes, "a rule checks that there is training data"
    if data.split:
        train, valid = split_corpora(prefixes, data.split)
    else:
        train = [Corpus(prefix) for prefix in prefixes]
        valid = {name: Corpus(prefix) for name, prefix in data.valid_sets.items()}
    return Sources(train, list(data.corpora.values()), valid, _tokenizer(data.tokenizer, train))


def _tokenizer(spec: str | None, corpora: Sequence[Corpus]) -> Tokenizer:
    """The one named, or the one a corpus was made with: `byte`, or what `data prepare` left in PREFIX.tokenizer."""
    if spec:
        return load_tokenizer(spec)
    for corpus in corpora:
        if corpus.info and corpus.info.tokenizer.get("type") == "byte":
            return load_tokenizer("byte")
        beside = Path(f"{corpus.prefix}.tokenizer")
        if beside.is_dir():
            return load_tokenizer(beside)
    raise DataError(f"no tokenizer is known for {corpora[0].prefix}; give data.tokenizer=byte or the path of its file")
