import shutil
from pathlib import Path

import numpy as np
import pytest

from nemohybrid.data._megatron import megatron
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.prepare import write_corpus
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import ByteTokenizer, train_bpe
from nemohybrid.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def pair(tmp_path) -> Path:
    """The prefix of a copy of `mc_u16` that a test may damage."""
    for suffix in (".bin", ".idx"):
        shutil.copy(FIXTURES / f"mc_u16{suffix}", tmp_path / f"pair{suffix}")
    return tmp_path / "pair"


@pytest.mark.parametrize("name, dtype", [("mc_u16", np.uint16), ("mc_i32", np.int32)])
def test_megatrons_files_read_and_written_again_are_the_same_bytes(name, dtype, tmp_path):
    corpus = Corpus(FIXTURES / name)
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(str(tmp_path / "again.bin"), dtype=dtype)
    marks = corpus.dataset.document_indices
    for document in range(corpus.num_documents):
        lengths = np.diff(corpus.starts)[marks[document] : marks[document + 1]]
        builder.add_document(corpus.tokens(document), lengths.tolist())
    builder.finalize(str(tmp_path / "again.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (FIXTURES / f"{name}{suffix}").read_bytes(), suffix


@pytest.mark.parametrize("name, dtype", [("mc_u16", "<u2"), ("mc_i32", "<i4")])
def test_any_span_equals_the_same_span_of_the_file(name, dtype):
    corpus, flat = Corpus(FIXTURES / name), np.fromfile(FIXTURES / f"{name}.bin", dtype=dtype)
    assert corpus.num_tokens == len(flat)
    for start in range(0, len(flat) + 1, 3):
        for stop in range(start, len(flat) + 1, 7):
            np.testing.assert_array_equal(corpus.read(start, stop), flat[start:stop], err_msg=f"[{start}, {stop})")


def test_tokens_outlive_the_corpus():
    tokens = Corpus(FIXTURES / "mc_u16").tokens(0)
    assert tokens[:3].tolist() == [38217, 30668, 16187]
    assert tokens.flags.owndata


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(suffix, pair):
    Path(f"{pair}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"pair\{suffix} not found"):
        Corpus(pair)


def test_a_wrong_prefix_gets_a_suggestion(pair):
    with pytest.raises(DataError, match="Did you mean 'pair'"):
        Corpus(pair.with_name("pairs"))
    with pytest.raises(DataError, match=r"without the suffix: .*pair$"):
        Corpus(pair.with_name("pair.bin"))


@pytest.mark.parametrize("suffix, size", [(".bin", 302), (".idx", 230)])
@pytest.mark.parametrize("cut", [1, 100])
def test_a_truncated_file_is_named_with_both_sizes(suffix, size, cut, pair):
    path = Path(f"{pair}{suffix}")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=rf"pair\{suffix} is truncated: {size - cut} bytes, expected {size}"):
        Corpus(pair)


def test_a_longer_bin_is_refused(pair):
    with Path(f"{pair}.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match="longer than its index says: 304 bytes, expected 302"):
        Corpus(pair)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\0\0", b"x" * 230], ids=["empty", "head", "other"])
def test_an_index_of_another_kind_is_refused(content, pair):
    Path(f"{pair}.idx").write_bytes(content)
    with pytest.raises(DataError, match=r"pair\.idx is (truncated|not the index)"):
        Corpus(pair)


def test_a_corpus_without_tokens_is_refused(tmp_path):
    indexed = megatron("indexed_dataset")
    for name, lengths in (("none", []), ("empty", [0])):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        builder.add_document(np.empty(0), lengths)
        builder.finalize(str(tmp_path / f"{name}.idx"))
        with pytest.raises(DataError, match="the corpus is empty"):
            Corpus(tmp_path / name)


def test_another_tokenizer_than_the_corpus_was_made_with_is_refused(tmp_path):
    write_corpus([Document("text", 1, 4)], tmp_path / "c", ByteTokenizer(), [])
    Corpus(tmp_path / "c").check_tokenizer(ByteTokenizer())
    with pytest.raises(
        DataError, match=r'prepared with the tokenizer {"type": "byte".*but the run uses {"type": "bpe"'
    ):
        Corpus(tmp_path / "c").check_tokenizer(train_bpe(["text"], 260))


def test_a_corpus_of_other_tools_says_nothing_about_its_tokenizer():
    corpus = Corpus(FIXTURES / "mc_u16")
    assert corpus.info is None
    corpus.check_tokenizer(ByteTokenizer())
