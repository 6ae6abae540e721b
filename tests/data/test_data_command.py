import pytest

from nemohybrid.cli.data import main
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.errors import DataError

LINES = '{"body": "first document, first document"}\n{"body": ""}\n{"body": "second document"}\n'


def run(tmp_path, *options: str, name: str = "in.jsonl", content: str = LINES) -> str:
    (tmp_path / name).write_text(content)
    prefix = str(tmp_path / "corpus")
    assert main(["prepare", "--input", str(tmp_path / name), "--output", prefix, *options]) == 0
    return prefix


@pytest.mark.parametrize("spec", ["byte", "bpe:260"])
def test_prepare_writes_a_corpus_and_its_tokenizer_and_says_so(spec, tmp_path, capsys):
    prefix = run(tmp_path, "--tokenizer", spec, "--text-field", "body")
    tokenizer, corpus = load_tokenizer(f"{prefix}.tokenizer"), Corpus(prefix)
    corpus.check_tokenizer(tokenizer)
    assert tokenizer.decode(corpus.tokens(1).tolist()) == "second document"
    printed = capsys.readouterr()
    assert "2 documents (1 empty left out)" in printed.out
    assert f"{corpus.num_tokens} tokens" in printed.out
    assert printed.err == "", "a progress bar was drawn where there is no terminal"


def test_the_tokenizer_of_one_corpus_prepares_another(tmp_path):
    prefix = run(tmp_path, "--tokenizer", "bpe:260", "--text-field", "body")
    tokenizer = load_tokenizer(f"{prefix}.tokenizer")
    tokenizer.save(tmp_path / "kept")
    prefix = run(tmp_path, "--tokenizer", str(tmp_path / "kept"), "--separator", "", name="b.txt", content="a\n\nb\n")
    assert Corpus(prefix).num_documents == 2
    Corpus(prefix).check_tokenizer(tokenizer)


def test_a_wrong_line_reaches_the_caller_as_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"in.jsonl, line 1: no field 'text'"):
        run(tmp_path, "--tokenizer", "byte")


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["prepare", "--help"])
    assert exit_info.value.code == 0
    assert "nemohybrid data prepare --input" in capsys.readouterr().out
