import io
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nemohybrid.data import epoch as epoch_module
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.epoch import Epoch
from nemohybrid.data.prepare import write_corpus
from nemohybrid.data.sampler import SampleStream, as_batch, corpus_seed, document_ids, epoch_seed
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import ByteTokenizer
from nemohybrid.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = np.load(FIXTURES / "expected_single_epoch.npz")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def bombs(sentinel: Path) -> dict[str, bytes]:
    """Files that run code when numpy loads them with `allow_pickle`."""
    array, npy, npz = np.array([Bomb(sentinel)], dtype=object), io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(npy, array, allow_pickle=True)
    np.savez(npz, array)
    return {"npy": npy.getvalue(), "npz": npz.getvalue(), "pickle": pickle.dumps(Bomb(sentinel))}


def numbered_corpus(prefix: Path, numbers: Sequence[int] = range(40)) -> Path:
    """Documents of unequal length whose samples are all different."""
    texts = [f"<{number}:" + "".join(f"{number * 100 + i:05d}" for i in range(3 + number % 7)) for number in numbers]
    write_corpus([Document(text, 1, len(text)) for text in texts], prefix, ByteTokenizer(), [])
    return prefix


def digest(stream: SampleStream, indices) -> dict[int, bytes]:
    return {index: stream[index].tobytes() for index in indices}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_one_epoch_equals_megatrons_own_samples(number, cached, tmp_path):
    epoch = Epoch(Corpus(FIXTURES / f"corpus{number}"), 32, seed=1234, cache_dir=tmp_path if cached else None)
    expected_tokens, expected_labels = EXPECTED[f"tokens{number}"], EXPECTED[f"labels{number}"]
    assert len(epoch) == len(expected_tokens)
    for index in range(len(epoch)):
        np.testing.assert_array_equal(epoch[index][:-1], expected_tokens[index], err_msg=f"sample {index}")
        np.testing.assert_array_equal(epoch[index][1:], expected_labels[index], err_msg=f"sample {index}")


def test_a_sample_depends_on_its_index_alone(tmp_path):
    prefix = numbered_corpus(tmp_path / "c")
    in_order = SampleStream(Corpus(prefix), 16, seed=7, cache_dir=tmp_path / "cache")
    indices = range(3 * in_order.samples_per_epoch + 5)
    expected = digest(in_order, indices)
    shuffled = random.Random(0).sample(indices, len(indices))
    assert digest(SampleStream(Corpus(prefix), 16, seed=7, cache_dir=None), shuffled) == expected, (
        "another order of asking"
    )
    late = range(len(indices) - 9, len(indices))
    alone = digest(SampleStream(Corpus(prefix), 16, seed=7, cache_dir=tmp_path / "cache"), late)
    assert alone == {index: expected[index] for index in late}, "a start in the middle"


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own(tmp_path):
    stream = SampleStream(Corpus(numbered_corpus(tmp_path / "c")), 16, seed=7, cache_dir=None)
    per_epoch = stream.samples_per_epoch
    epochs = [digest(stream, range(start, start + per_epoch)) for start in (0, per_epoch)]
    for epoch in epochs:
        assert len(set(epoch.values())) == per_epoch, "a sample came twice"
    assert list(epochs[0].values()) != list(epochs[1].values())
    other = SampleStream(Corpus(tmp_path / "c"), 16, seed=8, cache_dir=None)
    assert other[0].tobytes() != stream[0].tobytes()


def test_only_the_epochs_in_use_are_kept(tmp_path):
    stream = SampleStream(Corpus(numbered_corpus(tmp_path / "c")), 16, seed=7, cache_dir=None)
    for epoch in (5, 6, 7):
        stream[epoch * stream.samples_per_epoch]
    assert sorted(stream.epochs) == [6, 7]


def test_epoch_seeds_never_change():
    assert [epoch_seed(0, 0), epoch_seed(0, 1), epoch_seed(1234, 0)] == [3_091_149_402, 4_286_893_256, 3_904_989_216]


def test_the_first_corpus_has_the_seed_of_the_run_and_the_others_never_change_theirs():
    assert [corpus_seed(7, 0), corpus_seed(7, 1), corpus_seed(7, 2)] == [
        7,
        18_174_542_599_283_370_965,
        10_917_830_302_523_357_855,
    ]


def test_a_batch_shifts_labels_by_one_and_counts_them_all():
    stream = SampleStream(Corpus(FIXTURES / "corpus0"), 32, seed=1, cache_dir=None)
    batch = as_batch([stream[index] for index in (3, 0, 77)])
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (3, 32)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert torch.equal(batch.labels[2], torch.from_numpy(stream[77][1:]))
    assert batch.loss_mask.min() == 1


def test_an_eod_belongs_to_the_document_it_ends():
    tokens = torch.tensor([[5, 9, 6, 9, 9, 7], [9, 1, 1, 1, 1, 9]])
    expected = torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    torch.testing.assert_close(document_ids(tokens, eod=9), expected, rtol=0, atol=0)


@pytest.mark.parametrize("text, fits", [("x" * 15, False), ("x" * 16, True)])
def test_a_corpus_shorter_than_one_sample_says_how_much_is_missing(text, fits, tmp_path):
    write_corpus([Document(text, 1, 1)], tmp_path / "c", ByteTokenizer(), [])
    if fits:
        assert SampleStream(Corpus(tmp_path / "c"), 16, 0, None)[0].tolist() == [120] * 16 + [256]
        return
    with pytest.raises(DataError, match=r"has 16 tokens; one sample of sequence length 16 needs 17.*up to 15"):
        SampleStream(Corpus(tmp_path / "c"), 16, 0, None)


@pytest.mark.parametrize("kind", ["npy", "npz", "pickle"])
def test_a_bomb_in_the_cache_is_inert(kind, tmp_path):
    corpus, cache, sentinel = Corpus(FIXTURES / "corpus0"), tmp_path / "cache", tmp_path / "sentinel"
    Epoch(corpus, 32, 1234, cache)
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(bombs(sentinel)[kind])
    epoch = Epoch(corpus, 32, 1234, cache)
    assert not sentinel.exists(), "a file of the cache ran code"
    np.testing.assert_array_equal(epoch[0][:-1], EXPECTED["tokens0"][0])
    assert all(file.read_bytes()[:6] == b"\x93NUMPY" for file in files), "the damaged cache was not replaced"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data.replace(b"<i4", b"<f4")]
)
def test_a_damaged_cache_is_built_again(damage, tmp_path):
    corpus = Corpus(FIXTURES / "corpus0")
    Epoch(corpus, 32, 1234, tmp_path)
    for file in tmp_path.glob("*.npy"):
        file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(Epoch(corpus, 32, 1234, tmp_path)[5][:-1], EXPECTED["tokens0"][5])


def test_a_second_reader_builds_nothing(tmp_path, monkeypatch):
    corpus = Corpus(FIXTURES / "corpus0")
    first = Epoch(corpus, 32, 1234, tmp_path)[0]
    monkeypatch.setattr(epoch_module.IndexCache, "save", lambda self, indices: pytest.fail("built again"))
    np.testing.assert_array_equal(Epoch(corpus, 32, 1234, tmp_path)[0], first)


def test_a_corpus_prepared_again_gets_a_new_order_not_the_old_ones(tmp_path):
    prefix = numbered_corpus(tmp_path / "c")
    SampleStream(Corpus(prefix), 16, 7, tmp_path / "cache")[0]
    numbered_corpus(prefix, range(39, -1, -1))  # as many documents and tokens as before
    os.utime(f"{prefix}.idx", ns=(1, 1))
    stream, fresh = (SampleStream(Corpus(prefix), 16, 7, cache) for cache in (tmp_path / "cache", None))
    assert digest(stream, range(30)) == digest(fresh, range(30)), "indices of the old corpus were used"
