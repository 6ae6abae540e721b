"""Several corpora in one stream: who gives which sample, what identifies them, and what does not fit."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nemohybrid.data._megatron import megatron
from nemohybrid.data.corpus import Corpus, fingerprint
from nemohybrid.data.mixture import Mixture
from nemohybrid.data.sampler import SampleStream, corpus_seed
from nemohybrid.errors import DataError

LENGTH, SEED = 16, 7


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.int32) -> Path:
    """A corpus of the given ids, as Megatron's own tools would write it."""
    prefix.parent.mkdir(exist_ok=True)
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def counting(prefix: Path, first: int, documents: int = 30) -> Path:
    """Documents of unequal length that count upwards, so that every sample is another."""
    return write(prefix, [range(first + 50 * d, first + 50 * d + 20 + d) for d in range(documents)])


@pytest.fixture
def three(tmp_path) -> list[Path]:
    return [counting(tmp_path / name, 10_000 * number) for number, name in enumerate(("web", "code", "math"))]


def mix(prefixes: Sequence[Path], weights: Sequence[float] | None = None) -> Mixture:
    return Mixture([Corpus(prefix) for prefix in prefixes], weights or [1.0] * len(prefixes), LENGTH, SEED, None)


def rows(mixture: Mixture, start: int, stop: int) -> np.ndarray:
    """[samples, LENGTH + 1]"""
    tokens, labels, mask = mixture.batch(start, stop, 10**6)
    assert mask.min() == 1
    return torch.cat([tokens, labels[:, -1:]], dim=1).numpy()


def origin(samples: np.ndarray) -> list[int]:
    """Which of `three` each sample is from."""
    return [int(sample[0]) // 10_000 for sample in samples]


def test_a_corpus_alone_has_the_order_it_always_had(three):
    stream = SampleStream(Corpus(three[0]), LENGTH, SEED, None)
    np.testing.assert_array_equal(rows(mix(three[:1]), 0, 100), np.stack([stream[i] for i in range(100)]))


def test_each_corpus_of_a_blend_comes_in_its_own_order_through_its_own_epochs(three):
    """Over three epochs of the first corpus and less than one of the last."""
    mixture = mix(three, [0.7, 0.2, 0.1])
    total = 4 * mixture.streams[0].samples_per_epoch
    samples = rows(mixture, 0, total)
    for number, prefix in enumerate(three):
        mine = samples[np.array(origin(samples)) == number]
        alone = SampleStream(Corpus(prefix), LENGTH, corpus_seed(SEED, number), None)
        np.testing.assert_array_equal(mine, np.stack([alone[i] for i in range(len(mine))]), err_msg=prefix.name)
        assert len(mine) == mixture.blend.counts(total)[number]


def test_who_asks_first_knows_whether_an_order_must_be_made(three):
    mixture, known = mix(three, [5, 3, 2]), set()
    answers = []
    for start in range(0, 900, 12):
        answers.append(mixture.is_ready(start, start + 12))
        mixture.batch(start, start + 12, 10**6)
        now = {(corpus, number) for corpus, stream in enumerate(mixture.streams) for number in stream.epochs}
        assert answers[-1] == (now <= known), f"samples {start} to {start + 11}"
        known |= now
    assert set(answers) == {True, False}
    assert mixture.is_ready(0, 0)


def test_a_corpus_added_at_the_end_leaves_the_order_inside_the_others(three):
    before, after = rows(mix(three[:2]), 0, 60), rows(mix(three), 0, 90)
    kept = after[np.array(origin(after)) < 2]
    np.testing.assert_array_equal(kept, before)


def test_a_corpus_that_moves_keeps_order_and_identity(three, tmp_path):
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    here, there = mix(three), mix([moved / prefix.name for prefix in three])
    np.testing.assert_array_equal(rows(here, 0, 50), rows(there, 0, 50))
    for file in moved.iterdir():
        os.utime(file, ns=(1, 1))
    assert mix([moved / prefix.name for prefix in three]).identity() == here.identity()


def test_weights_of_another_scale_are_the_same_mixture(three):
    assert mix(three, [7, 2, 1]).identity() == mix(three, [0.7, 0.2, 0.1]).identity()


def test_whatever_changes_the_samples_changes_the_identity(three, tmp_path):
    base = mix(three).identity()
    assert mix(three[:2]).identity() != base
    assert mix([three[1], three[0], three[2]]).identity() != base, "the order of the corpora"
    assert mix(three, [2, 1, 1]).identity() != base
    part = [Corpus(three[0]).part(range(20)), *map(Corpus, three[1:])]
    assert Mixture(part, [1, 1, 1], LENGTH, SEED, None).identity() != base, "a split"
    sizes = [file.stat().st_size for file in sorted(tmp_path.iterdir())]
    counting(three[1], 10_001)  # other ids, as many documents and tokens
    assert [file.stat().st_size for file in sorted(tmp_path.iterdir())] == sizes
    assert mix(three).identity() != base, "a corpus prepared again"


@pytest.mark.parametrize("tokens, places", [(5_000, range(0, 20_000, 997)), (100_000, [0, 399_999])])
def test_the_fingerprint_sees_every_byte_of_a_small_corpus_and_both_ends_of_a_large_one(tokens, places, tmp_path):
    prefix = write(tmp_path / "c", [range(tokens)])
    file, before = Path(f"{prefix}.bin"), fingerprint(prefix)
    for place in places:
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        assert fingerprint(prefix) != before, f"byte {place}"
        content[place] ^= 1
        file.write_bytes(content)
    assert fingerprint(prefix) == before


def test_a_corpus_rewritten_while_it_is_open_keeps_the_identity_of_what_was_opened(three):
    opened = mix(three)
    before = opened.identity()
    for end in (".bin", ".idx"):
        Path(f"{three[0]}{end}").unlink()  # `data prepare` replaces files by renaming
    counting(three[0], 5)
    assert opened.identity() == before


@pytest.mark.parametrize("wrong", [61, 70_000, -1, -5])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_an_id_that_the_model_lacks_is_named_with_its_document(wrong, dtype, tmp_path):
    if dtype is np.uint16:
        wrong %= 2**16
    documents = [list(range(5, 45))] * 8
    documents[6] = [*range(5, 25), wrong, *range(26, 45)]
    mixture = mix([write(tmp_path / "good", documents[:6]), write(tmp_path / "bad", documents, dtype)])
    with pytest.raises(DataError, match=rf"bad, document 6: token id {wrong} is not one of the model\. Legal: 0 to 60"):
        mixture.batch(0, 40, vocabulary=61)


def test_the_first_and_the_last_id_of_the_model_fit(tmp_path):
    mix([write(tmp_path / "c", [[0, 60] * 30])]).batch(0, 6, vocabulary=61)


def test_a_corpus_shorter_than_its_share_of_a_batch_is_refused_and_the_hints_can_be_followed(three, tmp_path):
    short = write(tmp_path / "short", [range(100)])  # 6 samples of 16
    mixture = mix([three[0], short], [0.5, 0.5])
    with pytest.raises(DataError) as caught:
        mixture.check_batch(13)  # half of it is 6.5 samples: 7 in some batches
    told = str(caught.value)
    assert (
        "short is shorter than a batch: its 100 tokens are 6 samples of sequence length 16, one batch takes 7" in told
    )
    assert "train.global_batch up to 12, or use data.sequence_length up to 14" in told
    mixture.check_batch(12)
    Mixture([Corpus(three[0]), Corpus(short)], [0.5, 0.5], 14, SEED, None).check_batch(14)
    with pytest.raises(DataError):
        Mixture([Corpus(three[0]), Corpus(short)], [0.5, 0.5], 15, SEED, None).check_batch(14)


def test_all_corpora_that_are_too_short_are_listed(three):
    with pytest.raises(DataError, match=r"web is shorter[^\n]*\n[^\n]*code is shorter"):
        mix(three[:2]).check_batch(10_000)


def test_the_description_tells_shares_samples_epochs_and_what_is_repeated(three):
    per_epoch = SampleStream(Corpus(three[0]), LENGTH, SEED, None).samples_per_epoch
    head, web, code = mix(three[:2], [9, 1]).describe(10 * per_epoch)
    assert f"2 corpora, {10 * per_epoch:,} samples of 16 tokens" in head
    assert "90.00%" in web
    assert f"{9 * per_epoch:,} samples, 9.00 epochs: each text comes more than 4 times" in web
    assert "10.00%" in code
    assert code.endswith("1.00 epochs")
    assert mix(three[:1]).describe(2 * per_epoch) == [
        f"training text: {three[0]}, {2 * per_epoch:,} samples, 2.00 epochs"
    ]
