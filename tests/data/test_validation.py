import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nemohybrid.data._megatron import megatron
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.prepare import write_corpus
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import ByteTokenizer
from nemohybrid.data.validation import ValidationStream
from nemohybrid.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
BYTES = np.ones(131_072, dtype=np.int64)


@pytest.mark.parametrize("name", ["corpus0", "mc_i32"])
@pytest.mark.parametrize("length, overlap, batch_size", [(32, 0, 4), (32, 7, 3), (8, 7, 5), (1, 0, 16), (5000, 100, 1)])
def test_every_token_but_the_first_is_scored_once_after_its_predecessor(name, length, overlap, batch_size):
    stream = ValidationStream(Corpus(FIXTURES / name), length, BYTES, overlap)
    batches = list(stream.batches(batch_size))
    labels = torch.cat([batch.labels[batch.loss_mask.bool()] for batch in batches])
    tokens = torch.cat([batch.tokens[batch.loss_mask.bool()] for batch in batches])
    whole = Corpus(FIXTURES / name).read(0, stream.corpus.num_tokens)
    np.testing.assert_array_equal(labels.numpy(), whole[1:])
    np.testing.assert_array_equal(tokens.numpy(), whole[:-1])
    assert sum(batch.scored_bytes for batch in batches) == len(whole) - 1
    assert stream.batch([len(stream) - 1]).loss_mask.any(), "the last window scores nothing"


@pytest.mark.parametrize("overlap", [1, 9])
def test_a_scored_token_sees_at_least_overlap_tokens_before_it(overlap):
    stream = ValidationStream(Corpus(FIXTURES / "corpus0"), 16, BYTES, overlap)
    for batch in list(stream.batches(4))[1:]:
        scored = batch.loss_mask.bool()
        assert not scored[:, :overlap].any(), "a token at the head of a window was scored again"


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_windows_in_equal_numbers_of_equal_batches(world):
    stream = ValidationStream(Corpus(FIXTURES / "corpus0"), 32, BYTES, overlap=4)
    alone = torch.cat([batch.labels[batch.loss_mask.bool()] for batch in stream.batches(2)])
    shares = [list(stream.batches(2, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "ranks got different numbers of batches"
    assert {batch.tokens.shape for share in shares for batch in share} == {(2, 32)}
    together = [batch.labels[batch.loss_mask.bool()] for step in zip(*shares, strict=True) for batch in step]
    assert torch.equal(torch.cat(together), alone)


def test_bytes_scored_are_those_of_the_text_but_the_first_token(tmp_path):
    texts = ["Ærø\n", "über 9000", "😀"]
    tokenizer = ByteTokenizer()
    info = write_corpus([Document(text, 1, 1) for text in texts], tmp_path / "c", tokenizer, [])
    stream = ValidationStream(Corpus(tmp_path / "c"), 5, tokenizer.token_bytes(), overlap=2)
    assert info.text_bytes == sum(len(text.encode()) for text in texts)
    assert sum(batch.scored_bytes for batch in stream.batches(2)) == info.text_bytes - 1
    assert sum(int(batch.loss_mask.sum()) for batch in stream.batches(2)) == info.tokens - 1


def test_a_window_past_the_end_is_masked_and_legal():
    batch = ValidationStream(Corpus(FIXTURES / "corpus0"), 32, BYTES).batch([10**6])
    assert (batch.tokens.sum(), batch.labels.sum(), batch.loss_mask.sum(), batch.scored_bytes) == (0, 0, 0, 0)


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"overlap 32 does not fit windows of 32. Legal: 0 to 31"):
        ValidationStream(Corpus(FIXTURES / "corpus0"), 32, BYTES, overlap=32)
    with pytest.raises(DataError, match=r"holds token id .*; the tokenizer has 3 ids"):
        ValidationStream(Corpus(FIXTURES / "corpus0"), 32, BYTES[:3]).batch([0])


@pytest.mark.parametrize("length, overlap, batch_size", [(4, 0, 3), (7, 2, 1), (64, 0, 1)])
def test_bytes_that_a_tokenizer_puts_before_each_document_are_taken_off_again(length, overlap, batch_size, tmp_path):
    """Three documents, the first token of each worth one byte too many; that of the first document is never scored."""
    texts = [" one", " two\n", " three"]  # the blank in front is the tokenizer's
    tokenizer = ByteTokenizer()
    write_corpus([Document(text, 1, 1) for text in texts], tmp_path / "c", tokenizer, [])
    tokenizer.document_prefix = b" "
    counts, prefix_bytes = tokenizer.token_bytes(), tokenizer.prefix_bytes()
    corpus = Corpus(tmp_path / "c")
    stream = ValidationStream(corpus, length, counts, overlap, eod=tokenizer.eod, prefix_bytes=prefix_bytes)
    scored = sum(batch.scored_bytes for batch in stream.batches(batch_size))
    assert scored == len("one" + "two\n" + "three")


def test_an_empty_document_had_nothing_put_before_it(tmp_path):
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    for ids in ([7, 256], [256], [8, 9, 256]):
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "c.idx"))
    counts = ByteTokenizer().token_bytes()
    stream = ValidationStream(Corpus(tmp_path / "c"), 16, counts, eod=256, prefix_bytes=counts)
    assert stream.batch([0]).scored_bytes == 2 - 1


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"text_bytes": "x"}, {"documents": -1}])
def test_a_record_with_impossible_counts_is_refused(wrong, tmp_path):
    write_corpus([Document("text", 1, 1)], tmp_path / "c", ByteTokenizer(), [])
    record = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(record | wrong))
    with pytest.raises(DataError, match=f"does not describe a corpus: {next(iter(wrong))} is"):
        _ = Corpus(tmp_path / "c").info


def test_an_id_below_zero_is_refused(tmp_path):
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 2, -1, 3]), [4])
    builder.finalize(str(tmp_path / "c.idx"))
    with pytest.raises(DataError, match="holds token id -1"):
        ValidationStream(Corpus(tmp_path / "c"), 16, BYTES).batch([0])
