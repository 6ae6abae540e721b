import hashlib
from pathlib import Path

import pytest

from nemohybrid.data import bundled
from nemohybrid.data.bundled import bundled_text, plays, prepare_bundled
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.tokenizer import train_bpe
from nemohybrid.data.validation import ValidationStream
from nemohybrid.errors import DataError


@pytest.fixture(scope="module", params=["byte", "bpe:400"])
def prepared(request, tmp_path_factory):
    return prepare_bundled(tmp_path_factory.mktemp("bundled") / "data", request.param)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_file_splits_into_its_seven_plays_and_nothing_is_lost():
    assert [play.title for play in plays()] == [
        "HAMLET, PRINCE OF DENMARK",
        "MACBETH",
        "OTHELLO, THE MOOR OF VENICE",
        "THE TRAGEDY OF KING LEAR",
        "ROMEO AND JULIET",
        "A MIDSUMMER NIGHT'S DREAM",
        "JULIUS CAESAR",
    ]
    assert "".join(play.text for play in plays()) == bundled_text()
    assert (
        hashlib.sha256(bundled_text().encode()).hexdigest()
        == "266003a0bd03780153c1c6e2a079fd434773585bc322fed7505998998abad820"
    )


def test_train_and_valid_decode_to_the_plays(prepared):
    *train, valid = [play.text for play in plays()]
    for prefix, texts in ((prepared.train, train), (prepared.valid, [valid])):
        corpus = Corpus(prefix)
        decoded = [prepared.tokenizer.decode(corpus.tokens(i).tolist()) for i in range(corpus.num_documents)]
        assert decoded == texts, prefix
        corpus.check_tokenizer(prepared.tokenizer)


def test_every_byte_of_the_last_play_but_the_first_token_is_scored(prepared):
    stream = ValidationStream(Corpus(prepared.valid), 128, prepared.tokenizer.token_bytes(), overlap=32)
    batches = list(stream.batches(64))
    first = prepared.tokenizer.bytes_of(int(stream.corpus.read(0, 1)[0]))
    assert sum(batch.scored_bytes for batch in batches) == len(plays()[-1].text.encode()) - len(first)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == stream.corpus.num_tokens - 1


def test_the_tokenizer_learns_from_the_training_plays_only(tmp_path):
    expected = train_bpe([play.text for play in plays()[:-1]], 400).description
    assert prepare_bundled(tmp_path / "data", "bpe:400").tokenizer.description == expected


def test_preparing_again_changes_nothing(prepared):
    before = snapshot(prepared.train.parent)
    spec = "byte" if prepared.tokenizer.vocab_size == 257 else "bpe:400"
    assert prepare_bundled(prepared.train.parent, spec).tokenizer.description == prepared.tokenizer.description
    assert snapshot(prepared.train.parent) == before


def test_the_process_that_finishes_second_takes_what_is_there(tmp_path, monkeypatch):
    folder, fill = tmp_path / "data", bundled._fill
    published = {}

    def overtaken(staging, spec, marker):
        monkeypatch.setattr(bundled, "_fill", fill)
        prepare_bundled(folder, spec)
        published.update(snapshot(folder))
        fill(staging, spec, marker)

    monkeypatch.setattr(bundled, "_fill", overtaken)
    prepare_bundled(folder, "byte")
    assert snapshot(folder) == published, "the second process replaced what the first one published"
    assert list(tmp_path.iterdir()) == [folder], "a staging folder was left"


def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "write_corpus", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_bundled(tmp_path / "data", "byte")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_used(tmp_path):
    assert Corpus(prepare_bundled(tmp_path, "byte").train).num_documents == 6


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"was not made by prepare_bundled. Choose another folder"):
        prepare_bundled(tmp_path, "byte")
    prepare_bundled(tmp_path / "data", "byte")
    with pytest.raises(DataError, match=r'holds .*"type": "byte".* wanted .*"bpe:300"'):
        prepare_bundled(tmp_path / "data", "bpe:300")


def test_a_damaged_file_in_the_folder_is_named(tmp_path):
    prefix = prepare_bundled(tmp_path / "data", "byte").valid
    Path(f"{prefix}.bin").write_bytes(b"half")
    with pytest.raises(DataError, match=r"valid\.bin is truncated"):
        prepare_bundled(tmp_path / "data", "byte")
