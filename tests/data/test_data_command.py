import os
import pty
import re
import subprocess
import sys
import termios

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


def test_skipped_damage_is_reported_with_its_places(tmp_path, capsys):
    content = LINES + "{\n" * 7
    run(tmp_path, "--tokenizer", "byte", "--text-field", "body", "--on-error", "skip", content=content)
    printed = capsys.readouterr()
    assert "2 documents (1 empty, 7 damaged left out)" in printed.out
    lines = printed.err.splitlines()
    assert lines[0] == "7 damaged documents were left out:"
    assert lines[1].startswith(f"  {tmp_path}/in.jsonl, line 4: not a JSON object")
    assert (len(lines), lines[-1]) == (7, "  and 2 more")


def test_the_last_line_says_how_fast_it_went(tmp_path, capsys):
    run(tmp_path, "--tokenizer", "byte", "--text-field", "body")
    assert re.search(rf"^read {len(LINES)} bytes in \d+\.\d s, \d+\.\d MB/s\n\Z", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("option", ["--workers", "--train-bytes"])
def test_a_number_below_one_is_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--tokenizer", "byte", option, "0")
    assert "0 is below 1" in capsys.readouterr().err


def test_a_bar_is_drawn_on_a_terminal(tmp_path):
    """Over all workers, and done in the end: of the real command, on a terminal of its own."""
    files = [tmp_path / f"{name}.txt" for name in "ab"]
    for path in files:
        path.write_text("text " * 1000)
    command = ["nemohybrid", "data", "prepare", "--input", *map(str, files), "--output", str(tmp_path / "c")]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    done = subprocess.run(
        [sys.executable, "-m", *command, "--tokenizer", "byte", "--workers", "2"], stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0, drawn
    assert "prepare: 100%" in drawn, drawn
    assert "10.0k/10.0k" in drawn, drawn


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["prepare", "--help"])
    assert exit_info.value.code == 0
    assert "nemohybrid data prepare --input" in capsys.readouterr().out
