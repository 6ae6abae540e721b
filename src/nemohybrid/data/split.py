"""Cutting corpora into a part to train on, one to validate on, and one that is never read, as Megatron does.

Each part is a contiguous range of documents (Megatron: of sequences, entries of the index, as for its `GPTDataset`).
The borders are megatron-core 0.16's, float by float: `convert_split_vector_to_split_matrix` and
`BlendedMegatronDatasetBuilder._build_megatron_dataset_splits`.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from nemohybrid.data.corpus import Corpus
from nemohybrid.errors import DataError


def split_ranges(shares: Sequence[float], count: int) -> list[range]:
    """[train, valid, test] ranges of `count` documents. shares: one to three numbers of any scale, at least one above 0.

    A border is the sum of the shares before it, in floating point, times `count`, rounded half to even.
    """
    train, valid, test = [*shares, 0.0, 0.0][:3]
    total = train + valid + test  # not sum(), which Python 3.12 rounds in another way
    borders = [0.0]
    for share in (train, valid, test):
        borders.append(borders[-1] + share / total)
    edges = [round(border * count) for border in borders]
    return [range(first, stop) for first, stop in itertools.pairwise(edges)]


def split_corpora(prefixes: Sequence[str], shares: Sequence[float]) -> tuple[list[Corpus], dict[str, Corpus]]:
    """The training part of each corpus, and by name the validation parts; a single one has the name "".

    Raises DataError for a corpus with too few documents to give each part that has a share at least one.
    """
    wholes = [Corpus(prefix) for prefix in prefixes]
    cut = [(whole, split_ranges(shares, whole.num_sequences)) for whole in wholes]
    names = set_names(prefixes)
    train = [_part(whole, ranges[0], "training", shares) for whole, ranges in cut]
    if len(shares) < 2 or not shares[1]:
        return train, {}
    valid = [_part(whole, ranges[1], "validation", shares) for whole, ranges in cut]
    return train, dict(zip(names, valid, strict=True))


def set_names(prefixes: Sequence[str]) -> list[str]:
    """A name for the validation part of each corpus: the end of its prefix, as much of it as tells them apart."""
    if len(prefixes) == 1:
        return [""]
    deepest = max(len(Path(prefix).parts) for prefix in prefixes)
    for depth in range(1, deepest + 1):
        names = [re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join(Path(prefix).parts[-depth:])) for prefix in prefixes]
        if len(set(names)) == len(names):
            return names
    return [f"corpus{number}" for number in range(len(prefixes))]


def _part(whole: Corpus, sequences: range, purpose: str, shares: Sequence[float]) -> Corpus:
    if not sequences:
        listed = ", ".join(f"{share:g}" for share in shares)
        raise DataError(
            f"data.split=[{listed}] leaves no document of {whole.prefix} for {purpose}: it has {whole.num_sequences:,}. "
            f"Give {purpose} "
            f"a larger share, or name a validation corpus in data.valid instead"
        )
    return whole.part(sequences)
