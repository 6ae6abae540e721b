import itertools
import json
import struct

import numpy as np
import pytest

from nemohybrid.data._megatron import megatron
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.info import CorpusInfo
from nemohybrid.data.prepare import PrepareOptions, prepare, write_corpus
from nemohybrid.data.readers import Reading, read_unit
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import ByteTokenizer, Tokenizer
from nemohybrid.data.units import cut_into_units
from nemohybrid.errors import DataError


class WideTokenizer(Tokenizer):
    """Characters as ids, in a vocabulary of any size."""

    def __init__(self, vocab_size: int):
        super().__init__([b""] * vocab_size, eod=0)

    def encode(self, text):
        return [ord(char) for char in text]

    @property
    def description(self) -> dict[str, str | int]:
        return {"type": "wide"}

    def save(self, folder):
        raise NotImplementedError


WIDE = WideTokenizer(70_000)


def texts_of(prefix) -> list[str]:
    corpus = Corpus(prefix)
    documents = [corpus.tokens(document) for document in range(corpus.num_documents)]
    assert all(document[-1] == 256 for document in documents), "a document does not end with eod"
    return [ByteTokenizer().decode(document.tolist()) for document in documents]


def test_jsonl_and_text_become_one_corpus_that_says_what_it_is(tmp_path):
    jsonl, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    jsonl.write_text('{"text": "one\\n"}\n\n{"text": ""}\n{"id": 2, "text": "zwölf"}', encoding="utf-8")
    text.write_bytes(b"two\r\n\nlines\n")
    info = prepare([jsonl, text], tmp_path / "out" / "corpus.v2", ByteTokenizer()).info
    assert texts_of(tmp_path / "out" / "corpus.v2") == ["one\n", "zwölf", "two\r\n\nlines\n"]
    assert info == CorpusInfo(
        tokenizer=ByteTokenizer().description,
        documents=3,
        tokens=4 + 6 + 12 + 3,
        text_bytes=4 + 6 + 12,
        empty_documents_skipped=1,
        sources=[{"name": "a.jsonl", "bytes": jsonl.stat().st_size}, {"name": "b.txt", "bytes": 12}],
    )
    assert Corpus(tmp_path / "out" / "corpus.v2").info == info, "the .json beside the corpus says something else"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"corpus.v2.{end}" for end in ("bin", "idx", "json", "tokenizer")
    ]


def test_files_follow_megatrons_format_byte_by_byte(tmp_path):
    prepare_text(tmp_path, "ab\n\ncde", separator="")
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 4, 4) + struct.pack("<2q", 0, 8) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "c.idx").read_bytes() == expected
    assert (tmp_path / "c.bin").read_bytes() == np.array([97, 98, 10, 256, 99, 100, 101, 256], dtype="<u2").tobytes()


def prepare_text(tmp_path, text: str, separator=None) -> CorpusInfo:
    (tmp_path / "in.txt").write_bytes(text.encode())
    options = PrepareOptions(Reading(separator=separator))
    return prepare([tmp_path / "in.txt"], tmp_path / "c", ByteTokenizer(), options).info


def test_files_are_those_that_megatrons_builder_writes(tmp_path):
    lengths = [5, 70_000, 3]
    write_corpus([Document("x" * (length - 1), 1, 0) for length in lengths], tmp_path / "c", WIDE, [])
    indexed = megatron("indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for length in lengths:
        builder.add_document(np.array([ord("x")] * (length - 1) + [WIDE.eod]), [length])
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{suffix}" for name in "cm")
        assert ours.read_bytes() == theirs.read_bytes(), f".{suffix} is not what megatron writes"


@pytest.mark.parametrize(
    "separator, expected",
    [(None, ["a\n\n\nb\n---\n -- \nc"]), ("", ["a\n", "b\n---\n -- \nc"]), ("---", ["a\n\n\nb\n", " -- \nc"])],
)
def test_a_separator_line_splits_text_into_documents(separator, expected, tmp_path):
    info = prepare_text(tmp_path, "a\n\n\nb\n---\n -- \nc", separator)
    assert texts_of(tmp_path / "c") == expected
    assert info.empty_documents_skipped == 0


def test_a_document_knows_its_file_and_line(tmp_path):
    (tmp_path / "in.txt").write_text("a\n\n\nb\nc\n\nd")
    (unit,) = cut_into_units(tmp_path / "in.txt", "text")
    assert [document.place for document in read_unit(unit, Reading(separator=""))] == [1, 4, 7]


def test_no_text_and_no_file_are_errors(tmp_path):
    with pytest.raises(DataError, match="every document is empty"):
        prepare_text(tmp_path, "")
    with pytest.raises(DataError, match=r"absent.txt is not a file"):
        prepare([tmp_path / "absent.txt"], tmp_path / "c", ByteTokenizer())


def test_an_id_that_does_not_fit_is_refused_with_its_place(tmp_path):
    documents = [Document("ok", 1, 2), Document("\U0001f600", 9, 4)]
    with pytest.raises(DataError, match=r"document 9: token id 128512 does not fit. Legal: 0 to 65498"):
        write_corpus(documents, tmp_path / "c", WideTokenizer(65_499), [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocab_size, bytes_per_id", [(65_499, 2), (65_500, 4)])
def test_ids_take_two_bytes_below_65500_and_four_from_there(vocab_size, bytes_per_id, tmp_path):
    write_corpus([Document("a", 1, 1)], tmp_path / "c", WideTokenizer(vocab_size), [])
    assert (tmp_path / "c.bin").stat().st_size == 2 * bytes_per_id


def test_an_interrupted_run_leaves_the_old_corpus_whole(tmp_path):
    prepare_text(tmp_path, "old")

    def interrupted():
        yield Document("new", 1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(interrupted(), tmp_path / "c", ByteTokenizer(), [])
    assert texts_of(tmp_path / "c") == ["old"]
    assert len(list(tmp_path.iterdir())) == 5, "temporary files were left"


def test_a_new_corpus_replaces_the_old_one(tmp_path):
    for text in ("old and longer", "new"):
        prepare_text(tmp_path, text)
    assert texts_of(tmp_path / "c") == ["new"]


def test_preparing_streams_its_documents(tmp_path):
    endless = (Document("x", number, 1) for number in itertools.count())
    info = write_corpus(itertools.islice(endless, 1000), tmp_path / "c", ByteTokenizer(), [])
    assert info.tokens == 2000
    assert next(endless).place == 1000


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    info = prepare_text(tmp_path, "x")
    record = json.loads((tmp_path / "c.json").read_text())
    for new in ("damaged_documents_skipped", "unknown_tokens"):
        del record[new]
    (tmp_path / "c.json").write_text(json.dumps(record))
    assert CorpusInfo.load(tmp_path / "c.json") == info


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 2}', '{"format_version": 1, "tokens": 3}'])
def test_a_damaged_record_is_named(content, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DataError, match=r"c\.json"):
        CorpusInfo.load(tmp_path / "c.json")


def test_the_record_is_plain_json(tmp_path):
    info = prepare_text(tmp_path, "x")
    assert json.loads((tmp_path / "c.json").read_text())["tokens"] == info.tokens == 2
