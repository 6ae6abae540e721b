"""`nemohybrid data inspect`: what it says of our corpora and of Megatron's."""

import json

import numpy as np
import pytest

from nemohybrid.cli.data import main
from nemohybrid.data._megatron import megatron
from nemohybrid.data.inspect import printable
from nemohybrid.data.prepare import prepare, write_corpus
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import ByteTokenizer, train_bpe
from nemohybrid.errors import DataError

TEXTS = ["first\n", "second \U0001f600", "x", "last \x1b[31m" * 20]


@pytest.fixture
def corpus(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "in.jsonl").write_text(lines)
    prepare([tmp_path / "in.jsonl"], tmp_path / "c", train_bpe(TEXTS, 270))
    return str(tmp_path / "c")


@pytest.fixture
def foreign(tmp_path):
    """As Megatron's own tools leave it: no record, no tokenizer, several sequences to a document."""
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(str(tmp_path / "f.bin"), dtype=np.int32)
    builder.add_document(np.array([*b"one", *b"two"]), [3, 3])
    builder.add_document(np.array([300]), [1])
    builder.finalize(str(tmp_path / "f.idx"))
    return str(tmp_path / "f")


def printed(capsys, *words: str) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_a_corpus_says_what_it_is(corpus, capsys):
    out = printed(capsys, corpus)
    for expected in (
        f"{corpus}: 4 documents, ",
        "token ids: uint16",
        "shortest document: 2, 2 tokens",
        "longest document: 3, ",
        "0 empty, 0 damaged",
        '"type": "bpe"',
        "source: in.jsonl, ",
        'document 0 begins: "first\\n"',
        'document 1 begins: "second \U0001f600"',
    ):
        assert expected in out, f"{expected!r} is not in:\n{out}"
    assert "\x1b" not in out, "a document could command the terminal"


def test_what_commands_a_terminal_is_spelled_out():
    assert printable("a\tb\n\x1b[31m \x9b2J \u202e é\U0001f600") == "a\tb\n\\x1b[31m \\x9b2J \\x202e é\U0001f600"


@pytest.mark.parametrize("number, index", [(0, 0), (3, 3), (-1, 3), (-4, 0)])
def test_any_document_is_decoded(corpus, number, index, capsys):
    out = printed(capsys, corpus, "--document", str(number))
    assert out.startswith(f"document {index}: ")
    assert out.partition("\n")[2] == TEXTS[index] + "\n"


def test_several_documents_and_their_ids(corpus, capsys):
    out = printed(capsys, corpus, "--document", "2", "-2", "--ids")
    ids = " ".join(map(str, [*train_bpe(TEXTS, 270).encode("x"), 0]))
    assert out == f"document 2: 2 tokens\n{ids}\n" * 2


@pytest.mark.parametrize("number", [4, -5])
def test_a_document_that_is_not_there_is_refused(corpus, number):
    with pytest.raises(DataError, match=rf"no document {number}. Legal: 0 to 3, or -4 to -1"):
        main(["inspect", corpus, "--document", str(number)])


def test_a_corpus_of_bytes_needs_no_tokenizer_beside_it(tmp_path, capsys):
    write_corpus([Document("text", 1, 4)], tmp_path / "c", ByteTokenizer(), [])
    assert printed(capsys, str(tmp_path / "c"), "--document", "0").endswith("\ntext\n")


def test_a_corpus_of_megatron_is_read_with_a_tokenizer_or_as_ids(foreign, capsys):
    out = printed(capsys, foreign)
    for expected in ("2 documents in 3 sequences, 7 tokens", "int32, 28 bytes", "another tool", "begins: 111 110 101"):
        assert expected in out, f"{expected!r} is not in:\n{out}"
    assert printed(capsys, foreign, "--tokenizer", "byte", "--document", "0").endswith("\nonetwo\n")
    assert printed(capsys, foreign, "--ids", "--document", "1") == "document 1: 1 tokens\n300\n"
    with pytest.raises(DataError, match=r"no tokenizer is known for .* give --tokenizer SPEC, or --ids"):
        main(["inspect", foreign, "--document", "0"])


def test_ids_that_do_not_fit_the_tokenizer_are_named(foreign, corpus):
    with pytest.raises(DataError, match=r"document 1: token id 300 is outside .*Legal: 0 to 256. The corpus was made"):
        main(["inspect", foreign, "--tokenizer", "byte", "--document", "1"])
    with pytest.raises(DataError, match="was prepared with the tokenizer"):
        main(["inspect", corpus, "--tokenizer", "byte"])


def test_a_corpus_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not found"):
        main(["inspect", str(tmp_path / "absent")])
