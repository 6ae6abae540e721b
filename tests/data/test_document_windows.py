"""Validation documents each by itself: every token once, from the context that lm-evaluation-harness gives it."""

import numpy as np
import pytest

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.document_windows import CorpusDocuments, DocumentWindows
from nemohybrid.data.prepare import prepare
from nemohybrid.data.tokenizer import ByteTokenizer
from nemohybrid.errors import DataError

EOD = 256


def rolling(ids: list[int], length: int) -> list[tuple[list[int], list[int]]]:
    """(what is read, what is scored at its end), as the harness's documentation describes rolling windows with context 1."""
    pairs, done = [], 0
    while done < len(ids):
        end = min(done + length, len(ids))
        line = [EOD, *ids]
        pairs.append((line[max(0, end - length) : end], ids[done:end]))
        done = end
    return pairs


@pytest.mark.parametrize("length", [1, 3, 4, 7, 100])
def test_windows_are_those_of_the_harness(length):
    documents = [np.arange(10, 10 + n) for n in (1, 3, 4, 8, 11)]
    rows = [
        (tokens[: int(np.flatnonzero(mask)[-1]) + 1].tolist(), labels[mask.bool()].tolist())
        for batch in DocumentWindows(documents, length, ByteTokenizer()).batches(2)
        for tokens, labels, mask in zip(*batch[:3], strict=True)
        if mask.any()
    ]
    assert rows == [pair for ids in documents for pair in rolling(ids.tolist(), length)]


def test_labels_follow_their_tokens():
    windows = DocumentWindows([np.arange(20)], 8, ByteTokenizer())
    (batch,) = windows.batches(3)
    assert batch.tokens.tolist() == [[EOD, *range(7)], list(range(7, 15)), list(range(11, 19))]
    assert batch.labels.tolist() == [list(range(8)), list(range(8, 16)), list(range(12, 20))]
    assert batch.loss_mask.sum(1).tolist() == [8, 8, 4]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_all_windows_in_equal_batches(world):
    windows = DocumentWindows([np.arange(50), np.arange(5)], 8, ByteTokenizer())
    ranks = [list(windows.batches(2, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sum(int(batch.loss_mask.sum()) for batches in ranks for batch in batches) == 55
    assert sum(batch.scored_bytes for batches in ranks for batch in batches) == 55


def test_a_corpus_gives_its_documents_without_their_ends(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    prepare([tmp_path / "text.jsonl"], tmp_path / "corpus", ByteTokenizer())
    corpus = Corpus(tmp_path / "corpus")
    whole = [ids.tolist() for ids in CorpusDocuments(corpus, EOD)]
    assert [ids for ids in whole if ids] == [[97, 98], [99]]
    part = corpus.part(range(corpus.num_sequences - 1, corpus.num_sequences))
    assert [ids.tolist() for ids in CorpusDocuments(part, EOD)] == [[99]]


def test_documents_without_tokens_and_strange_ids_are_refused():
    with pytest.raises(DataError, match="have no tokens to predict"):
        DocumentWindows([np.array([], dtype=np.int64)], 8, ByteTokenizer())
    with pytest.raises(DataError, match="validation document 1 holds token id 300; the tokenizer has 257 ids"):
        list(DocumentWindows([np.arange(3), np.array([300])], 8, ByteTokenizer()).batches(2))
