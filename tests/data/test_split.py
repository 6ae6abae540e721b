"""Parts of a corpus are those that megatron-core cuts, and what is left out is never read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.data._megatron import megatron
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.epoch import Epoch, _gpt_config
from nemohybrid.data.split import set_names, split_corpora, split_ranges
from nemohybrid.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
SPLITS = [[98, 1, 1], [90, 10, 0], [969, 30, 1], [0.7, 0.2, 0.1], [1, 1, 1], [100, 0, 0], [5, 0, 5], [3, 1]]


def megatrons(shares: list[float], prefix: Path) -> list:
    """The train, valid and test datasets of megatron's own builder, one epoch each; None for no share."""
    config: Any = _gpt_config(str(prefix), 32, 1234)
    config.split = ",".join(map(str, shares))
    config.__post_init__()
    builder = megatron("blended_megatron_dataset_builder").BlendedMegatronDatasetBuilder
    return builder(megatron("gpt_dataset").GPTDataset, [None] * 3, lambda: True, config).build()


@pytest.mark.parametrize("shares", SPLITS, ids=str)
@pytest.mark.parametrize("name", ["corpus0", "corpus1"])
def test_the_parts_and_their_samples_are_those_of_megatrons_builder(shares, name):
    prefix = FIXTURES / name
    ranges = split_ranges(shares, Corpus(prefix).num_sequences)
    for sequences, theirs in zip(ranges, megatrons(shares, prefix), strict=True):
        assert list(sequences) == ([] if theirs is None else theirs.indices.tolist())
    train = megatrons(shares, prefix)[0]
    ours = Epoch(Corpus(prefix).part(ranges[0]), 32, seed=1234, cache_dir=None)
    assert len(ours) == len(train)
    for index in range(len(ours)):
        np.testing.assert_array_equal(ours[index][:-1], train[index]["tokens"].numpy(), err_msg=f"sample {index}")


@settings(max_examples=300, deadline=None)
@given(
    shares=st.lists(st.sampled_from([0, 0.1, 0.3, 1, 2, 3, 7, 33.3, 98, 969]), min_size=3, max_size=3).filter(any),
    count=st.integers(1, 10**9),
)
def test_borders_are_rounded_as_megatron_rounds_them(shares, count):
    module = megatron("blended_megatron_dataset_config")
    vector = module.parse_and_normalize_split(",".join(map(str, shares)))
    theirs = module.convert_split_vector_to_split_matrix(vector)
    for ours, pair in zip(split_ranges(shares, count), theirs, strict=True):
        expected = range(0) if pair is None else range(*(int(round(end * float(count))) for end in pair))  # noqa: RUF046
        assert list(ours[:2]) == list(expected[:2]), (shares, count)
        assert len(ours) == len(expected), (shares, count)


def test_a_part_reads_its_own_documents_and_no_others():
    whole = Corpus(FIXTURES / "corpus0")
    (train,), valid = split_corpora([str(FIXTURES / "corpus0")], [80, 10, 10])
    assert list(valid) == [""], "a single corpus needs no name"
    parts = [train, valid[""]]
    assert parts[0].sequences.stop == parts[1].sequences.start < parts[1].sequences.stop < whole.num_sequences
    start = 0
    for part in parts:
        np.testing.assert_array_equal(part.read(0, part.num_tokens), whole.read(start, start + part.num_tokens))
        np.testing.assert_array_equal(part.read(3, 9), whole.read(start + 3, start + 9))
        assert part.num_documents == len(part.sequences)
        start += part.num_tokens


def test_parts_of_the_same_size_share_a_cache_and_each_gets_its_own_samples(tmp_path):
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for document in range(8):
        builder.add_document(np.arange(100 * document, 100 * document + 40), [40])
    builder.finalize(str(tmp_path / "c.idx"))
    for first in (0, 4):
        epoch = Epoch(Corpus(tmp_path / "c").part(range(first, first + 4)), 16, seed=1, cache_dir=tmp_path / "cache")
        found = {int(token) // 100 for index in range(len(epoch)) for token in epoch[index]}
        assert found == set(range(first, first + 4)), "documents of another part"


def test_parts_are_named_after_their_corpora(tmp_path):
    assert set_names(["c/web", "c/code v2"]) == ["web", "code_v2"]
    assert set_names(["web/text_document", "code/text_document"]) == ["web-text_document", "code-text_document"]
    assert set_names(["c/a b", "c/a_b"]) == ["corpus0", "corpus1"], "no two may have the same name"


@pytest.mark.parametrize("shares, purpose", [([1, 100_000], "training"), ([100_000, 1], "validation")])
def test_a_share_too_small_for_one_document_is_refused(shares, purpose):
    with pytest.raises(DataError, match=rf"leaves no document of .*corpus0 for {purpose}: it has \d+"):
        split_corpora([str(FIXTURES / "corpus0"), str(FIXTURES / "corpus1")], shares)


def test_a_share_of_nothing_validates_nothing():
    assert split_corpora([str(FIXTURES / "corpus0")], [9, 0, 1])[1] == {}
    assert split_corpora([str(FIXTURES / "corpus0")], [9])[1] == {}
