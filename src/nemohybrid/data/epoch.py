"""One epoch of one corpus: which tokens make each sample, in megatron's shuffled order.

megatron's GPTDataset shuffles the documents, cuts their concatenation into samples and shuffles those. It would also
keep the three index arrays on disk itself, but loads them with `allow_pickle=True` (a planted file runs code), lets
only rank 0 build while the others must wait, and keeps stale ones when a corpus is rewritten. Here it builds in
memory and we keep the arrays: typed, checked, written atomically, under a name that follows the corpus files.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from nemohybrid.data._megatron import megatron
from nemohybrid.data.corpus import Corpus
from nemohybrid.errors import DataError

logger = logging.getLogger(__name__)

Indices = tuple[NDArray, NDArray, NDArray]  # order of documents [n], sample starts [samples + 1, 2], order of samples
INDEX_NAMES = ("documents", "starts", "order")


class Epoch:
    """Every sample of a corpus, or of a part of one, once.

    Each has `sequence_length + 1` ids; up to `sequence_length` ids are left over.

    seed: megatron's `random_seed`, 0 to 2^32 - 1; the samples equal those of its `GPTDataset` with `num_samples=None`.
    cache_dir: where index arrays are kept for other ranks and restarts; None builds them in memory each time.
    Any number of processes may build the same epoch at once. Raises DataError when there is no whole sample.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, cache_dir: str | Path | None):
        self.num_samples = samples_per_epoch(corpus, sequence_length)
        cache = IndexCache(Path(cache_dir), corpus, sequence_length, seed) if cache_dir is not None else None
        self.dataset = _gpt_dataset_class()(corpus, cache, _gpt_config(corpus.prefix, sequence_length, seed))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """[sequence_length + 1] the ids of one sample, as they are on disk: megatron's own would turn -1 into 0."""
        return self.dataset._query_document_sample_shuffle_indices(index)[0]

    def sequences_of(self, index: int) -> NDArray[np.int64]:
        """The entries of the index that one sample is made of, in order."""
        return self.dataset._query_document_sample_shuffle_indices(index)[1]


class IndexCache:
    """The index arrays of one epoch, as `.npy` files in a folder that processes share.

    Nothing in the folder is trusted: a file with objects, of another type or of another size is built again.
    """

    def __init__(self, folder: Path, corpus: Corpus, sequence_length: int, seed: int):
        self.folder = folder
        num_samples = samples_per_epoch(corpus, sequence_length)
        self.expected = {
            "documents": (corpus.num_sequences,),
            "starts": (num_samples + 1, 2),
            "order": (num_samples,),
        }
        part = [corpus.sequences.start, corpus.sequences.stop]
        key = [str(Path(corpus.prefix).resolve()), *_identity(corpus), *part, sequence_length, seed]
        digest = hashlib.sha256(json.dumps(key).encode("utf-8")).hexdigest()[:32]
        self.paths = {name: folder / f"{digest}.{name}.npy" for name in INDEX_NAMES}

    def load(self) -> Indices | None:
        """The arrays, mapped from disk; None when one is absent or damaged."""
        if not all(path.is_file() for path in self.paths.values()):
            return None
        try:
            documents, starts, order = (self._open(name) for name in INDEX_NAMES)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            logger.warning("building the samples again, their cache is damaged: %s", error)
            return None
        return documents, starts, order

    def save(self, indices: Indices) -> None:
        """Write each array under a temporary name and rename it."""
        for name, array in zip(INDEX_NAMES, indices, strict=True):
            temporary = self.paths[name].with_suffix(f".{uuid.uuid4().hex}.tmp")
            try:
                with temporary.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                temporary.replace(self.paths[name])
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One builder at a time. Only a saving: where a file system has no locks, all build the same arrays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _open(self, name: str) -> NDArray:
        array = open_memmap(self.paths[name], mode="r")  # refuses objects before it reads them
        if array.dtype.kind not in "iu" or array.shape != self.expected[name]:
            raise ValueError(
                f"{self.paths[name]} holds {array.dtype} {array.shape}, expected integers {self.expected[name]}"
            )
        return array


def samples_per_epoch(corpus: Corpus, sequence_length: int) -> int:
    """How many whole samples the corpus holds. Raises DataError when there is none."""
    samples = (corpus.num_tokens - 1) // sequence_length
    if samples < 1:
        raise DataError(
            f"{corpus.prefix} has {corpus.num_tokens:,} tokens; one sample of sequence length {sequence_length:,} "
            f"needs {sequence_length + 1:,}. Add text, or use a sequence length up to {max(corpus.num_tokens - 1, 1):,}"
        )
    return samples


def _identity(corpus: Corpus) -> list[int]:
    """Size and time of the index file: a corpus prepared again at the same place is another one."""
    status = Path(f"{corpus.prefix}.idx").stat()
    return [status.st_size, status.st_mtime_ns]


@functools.cache
def _gpt_dataset_class() -> type:
    module = megatron("gpt_dataset")
    # It warns that it keeps no indices on disk, which is the point.
    logging.getLogger(module.__name__).setLevel(logging.ERROR)

    class CachedGPTDataset(module.GPTDataset):
        """megatron's GPTDataset on one epoch of a corpus, with our storage of its indices."""

        def __init__(self, corpus: Corpus, cache: IndexCache | None, config: object):
            self.cache = cache
            sequences = np.arange(corpus.sequences.start, corpus.sequences.stop, dtype=np.int32)
            split = megatron("utils").Split.train
            super().__init__(corpus.dataset, corpus.prefix, sequences, None, split, config)

        def _build_document_sample_shuffle_indices(self) -> Indices:
            if self.cache is None:
                return super()._build_document_sample_shuffle_indices()
            if (found := self.cache.load()) is not None:
                return found
            with self.cache.lock():
                if (found := self.cache.load()) is not None:
                    return found
                indices = super()._build_document_sample_shuffle_indices()
                self.cache.save(indices)
            return indices

    return CachedGPTDataset


class _NoTokenizer:
    """What GPTDatasetConfig asks of a tokenizer; token ids on disk need none."""

    vocab_size = None
    eod = None
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012  megatron reads it as a plain attribute


def _gpt_config(prefix: str, sequence_length: int, seed: int) -> object:
    return megatron("gpt_dataset").GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache="",  # build in memory, on whichever rank asks
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
