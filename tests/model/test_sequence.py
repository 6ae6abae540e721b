"""What layers are told about their rows."""

import pytest
import torch

from nemohybrid.errors import DataError
from nemohybrid.model import DecodeCache, SequenceContext
from nemohybrid.model.sequence import segment_numbers

CPU = torch.device("cpu")


def test_packed_numbers_the_documents_of_each_row():
    seq = SequenceContext.packed([[2, 1, 3], [6]])
    assert (seq.batch, seq.length, seq.tokens) == (2, 6, 12)
    assert seq.document_ids is not None
    assert seq.document_ids.tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[2, 3], [4]], r"equally long; these hold \[5, 4\]"),
        ([], r"equally long; these hold \[\]"),
        ([[]], r"at least one token; the lengths are \[\[\]\]"),
        ([[3, 0], [3]], r"at least one token; the lengths are \[\[3, 0\], \[3\]\]"),
        ([[5, -2], [3]], "at least one token"),
    ],
)
def test_packed_refuses_rows_that_are_none(lengths, message):
    with pytest.raises(DataError, match=message):
        SequenceContext.packed(lengths)


def test_document_ids_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"document_ids are \[2, 5\], but the rows are \[2, 6\]"):
        SequenceContext(2, 6, torch.zeros(2, 5))


def test_a_context_for_other_rows_is_refused(tiny_model, token_rows):
    """[2, 6] and [3, 4] hold equally many tokens, so nothing else would notice."""
    with pytest.raises(DataError, match=r"input_ids are \[2, 6\], but the sequence context describes \[3, 4\]"):
        tiny_model("-")(token_rows(2, 6), SequenceContext(3, 4))


def test_an_id_that_comes_back_is_another_segment():
    ids = torch.tensor([[4, 4, 1, 1, 4, 4], [0, 0, 0, 0, 0, 9]])
    assert segment_numbers(ids).tolist() == [[1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2]]


def test_the_mask_lets_a_token_see_the_past_of_its_document_only():
    mask = SequenceContext(1, 5, torch.tensor([[4, 4, 1, 4, 4]])).attention_mask(CPU)
    assert mask is not None
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_positions_restart_at_every_document():
    seq = SequenceContext(2, 5, torch.tensor([[4, 4, 1, 4, 4], [0, 0, 0, 0, 0]]))
    assert seq.positions(CPU).tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert SequenceContext(2, 3).positions(CPU).tolist() == [[0, 1, 2], [0, 1, 2]]


def advanced(length: int, ids: list[int] | None) -> DecodeCache:
    cache = DecodeCache()
    SequenceContext(1, length, None if ids is None else torch.tensor([ids]), cache).advance()
    return cache


@pytest.mark.parametrize(
    ("past", "now", "everything", "positions"),
    [
        (None, None, None, [3, 4]),
        ([0, 0, 1], None, [0, 0, 1, 1, 1], [1, 2]),  # goes on with the last document
        (None, [5, 6], [5, 5, 5, 5, 6], [3, 0]),  # the first of these goes on with the row so far
        ([0, 0, 1], [1, 2], [0, 0, 1, 1, 2], [1, 0]),
    ],
)
def test_the_cache_remembers_documents(past, now, everything, positions):
    cache = advanced(3, past)
    seq = SequenceContext(1, 2, None if now is None else torch.tensor([now]), cache)
    ids = seq.all_document_ids()
    assert (None if ids is None else ids[0].tolist()) == everything
    assert seq.positions(CPU).tolist() == [positions]
    seq.advance()
    assert cache.length == 5


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_rows_without_tokens_are_refused(shape, tiny_model):
    with pytest.raises(DataError, match=r"input_ids are \[.*there is no token"):
        tiny_model("M*-E")(torch.zeros(shape, dtype=torch.int64))
