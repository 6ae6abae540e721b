"""Runs on blends and splits, with several validation sets; and on corpora that cannot be trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from nemohybrid.__main__ import main
from nemohybrid.data._megatron import megatron
from nemohybrid.data.bundled import plays
from nemohybrid.data.corpus import Corpus
from nemohybrid.data.prepare import write_corpus
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.errors import CheckpointError, DataError
from nemohybrid.observe.metrics import read_metrics, scalars
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.data import RunData
from nemohybrid.train.evaluation import Evaluation, Score
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer

PARTS = {"web": (0, 20_000), "code": (20_000, 6_000), "web_valid": (40_000, 700), "code_valid": (50_000, 400)}


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """A folder with corpora of pieces of a play, each cut into documents of 500 characters."""
    folder, text = tmp_path_factory.mktemp("parts"), plays()[0].text
    for name, (start, length) in PARTS.items():
        pieces = [text[i : i + 500] for i in range(start, start + length, 500)]
        write_corpus([Document(piece, 1, 500) for piece in pieces], folder / name, load_tokenizer("byte"), [])
    return folder


@pytest.fixture
def blended(parts) -> list[str]:
    """Overrides: 7 of web to 3 of code, both validated."""
    return [
        f"data.train={{{parts}/web: 7, {parts}/code: 3}}",
        f"data.valid={{web: {parts}/web_valid, code: {parts}/code_valid}}",
    ]


def sequences(data: RunData, step: int) -> np.ndarray:
    """[rows, L + 1] what this rank trains on in `step`."""
    batch = data.batch(step)
    return torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).numpy()


@pytest.mark.parametrize("ranks, microbatch", [(2, 1), (4, 3), (12, 1)])
def test_any_number_of_ranks_sees_the_same_samples_of_a_blend_in_the_same_order(configure, blended, ranks, microbatch):
    ramp = ["train.global_batch=24", "train.batch_ramp.start=12", "train.batch_ramp.increment=12"]
    config = configure(*blended, *ramp, "train.batch_ramp.samples=24", "train.steps=6")
    alone = RunData(config, ParallelContext.single())
    context = [ParallelContext(torch.device("cpu"), data=Group(ranks, rank)) for rank in range(ranks)]
    world = [RunData(config, each) for each in context]
    for step in (1, 2, 3, 4, 6):
        together = np.concatenate([sequences(rank, step) for rank in world])
        np.testing.assert_array_equal(together, sequences(alone, step), err_msg=f"step {step}")


def test_the_samples_of_a_blend_do_not_depend_on_the_length_of_the_run(configure, blended):
    short, long = (RunData(configure(*blended, f"train.steps={n}"), ParallelContext.single()) for n in (5, 500))
    for step in (1, 2, 5):
        np.testing.assert_array_equal(sequences(short, step), sequences(long, step))


def test_a_blend_that_stops_and_goes_on_is_the_blend_that_never_stopped(start, blended, tmp_path):
    start(*blended, "train.steps=6", f"run.dir={tmp_path}/straight")
    start(*blended, "train.steps=6", "train.stop_at=2")
    start(*blended, "train.steps=6")
    losses = [[r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("straight", "run")]
    assert losses[0] == losses[1]


def test_every_set_with_a_name_is_scored_and_the_headline_is_all_of_them_as_one_text(configure, blended, parts):
    trainer = Trainer(configure(*blended), ParallelContext.single(), [])
    both = trainer.evaluate()
    assert list(both.sets) == ["web", "code"]
    tokens = {name: Corpus(parts / f"{name}_valid").num_tokens - 1 for name in both.sets}
    nats = {name: tokens[name] * score.val_loss for name, score in both.sets.items()}
    assert both.val_loss == pytest.approx(sum(nats.values()) / sum(tokens.values()), rel=1e-9)
    text = {name: nats[name] / score.val_bits_per_byte for name, score in both.sets.items()}  # bytes, times ln 2
    assert both.val_bits_per_byte == pytest.approx(sum(nats.values()) / sum(text.values()), rel=1e-9)
    for name, score in both.sets.items():
        alone = Trainer(configure(f"data.valid={parts}/{name}_valid"), ParallelContext.single(), []).evaluate()
        assert (alone.sets, alone.val_bits_per_byte) == ({}, pytest.approx(score.val_bits_per_byte, rel=1e-6)), name


def test_the_names_reach_metrics_lines_picture_and_tensorboard(start, blended, tmp_path, capsys):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    show = ["logging.console=lines", "logging.picture=true", "logging.tensorboard=true"]
    start(*blended, *show, "train.evaluate_every=2", "train.steps=2")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    keys = [f"{key}{name}" for key in ("val_loss", "val_bits_per_byte") for name in ("", "/web", "/code")]
    assert set(record) == {"step", *keys}
    out = capsys.readouterr().out
    for name in ("web", "code"):
        assert f"{name:4}  loss {record[f'val_loss/{name}']:.4f}" in out
        assert f"  {name}: {record[f'val_bits_per_byte/{name}']:.3f} bits per byte" in out, "not at the end"
    assert len(np.unique(matplotlib.image.imread(tmp_path / "run" / "loss.png").reshape(-1, 4), axis=0)) > 10
    written = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    assert set(keys) <= set(written.Tags()["scalars"])


def test_trackers_get_named_scores_flat():
    evaluation = Evaluation(3, 2.0, 3.0, {"web": Score(1.0, 1.5)})
    expected = {"val_loss": 2.0, "val_bits_per_byte": 3.0, "val_loss/web": 1.0, "val_bits_per_byte/web": 1.5}
    assert scalars(evaluation) == expected


def test_a_split_trains_on_one_part_and_validates_on_the_next(configure, parts):
    train = f"data.train={{{parts}/web: 1, {parts}/code: 1}}"
    config = configure(train, "data.valid=null", "data.split=[80,10,10]", "train.evaluate_every=1")
    data = RunData(config, ParallelContext.single())
    assert [stream.corpus.sequences for stream in data.train.streams] == [range(32), range(10)]  # of 40 and 12
    assert {name: valid.corpus.sequences for name, valid in data.valid.items()} == {
        "web": range(32, 36),
        "code": range(10, 11),
    }
    assert np.isfinite(Trainer(config, ParallelContext.single(), []).evaluate().sets["code"].val_loss)


def test_another_mix_is_refused_on_resume_and_a_folder_that_moved_is_not(start, blended, parts, tmp_path):
    start(*blended, "train.stop_at=2")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        start(f"data.train={{{parts}/web: 1, {parts}/code: 1}}")
    assert "data.corpora[0].share: 7/10 -> 1/2" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"data\.corpora\[1\]: \{"):
        start(f"data.train={parts}/web")
    with pytest.raises(CheckpointError, match=r"data\.corpora\[0\]\.documents: \[0, 40\] -> \[0, 36\]"):
        start(blended[0], "data.valid=null", "data.split=[9,1]")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before, "a refused resume wrote something"
    shutil.copytree(parts, tmp_path / "moved")
    start(*(word.replace(str(parts), str(tmp_path / "moved")) for word in blended))


def test_a_corpus_prepared_again_between_two_parts_of_a_run_is_noticed(start, parts, tmp_path):
    for file in parts.glob("code.*"):
        shutil.copy(file, tmp_path)
    train = f"data.train={tmp_path}/code"
    start(train, "train.stop_at=2")
    again = [Document(plays()[1].text[i : i + 500], 1, 500) for i in range(0, 6_000, 500)]
    write_corpus(again, tmp_path / "code", load_tokenizer("byte"), [])
    with pytest.raises(CheckpointError, match=r"data\.corpora\[0\]\.fingerprint: \w+ -> \w+"):
        start(train)


def test_an_id_that_does_not_fit_on_one_rank_stops_both(configure, run_ranks, tmp_path):
    rewrite(tmp_path / "bad", 300, tokens=8 * 32 + 1)  # 8 samples, two batches; the id is in one of them
    load_tokenizer("byte").save(tmp_path / "bad.tokenizer")
    config = configure(f"data.train={tmp_path}/bad", "data.valid=null", world_size=2)
    failures = run_ranks(lambda context: run(config, context))
    assert all(failures), "a rank went on"
    assert sum("token id 300 is not one of the model" in failure for failure in failures) >= 1, failures
    assert not list(tmp_path.glob("run/checkpoints/step_*"))


def test_a_blend_with_a_corpus_of_another_tokenizer_is_refused(configure, parts, tmp_path):
    other = load_tokenizer("byte")
    write_corpus([Document("text " * 400, 1, 1)], tmp_path / "other", other, [])
    record = json.loads((tmp_path / "other.json").read_text())
    record["tokenizer"] = {"type": "bpe", "sha256": "0" * 64, "vocab_size": 257, "eod": 0}
    (tmp_path / "other.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="other was prepared with the tokenizer"):
        RunData(configure(f"data.train={{{parts}/web: 1, {tmp_path}/other: 1}}"), ParallelContext.single())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "bin": (lambda here, _: cut(Path(f"{here}.bin")), ".bin is truncated"),
    "idx": (lambda here, _: cut(Path(f"{here}.idx")), ".idx is truncated"),
    "swapped": (lambda here, parts: shutil.copy(parts / "code.idx", f"{here}.idx"), "longer than its index says"),
    "garbage": (lambda here, _: Path(f"{here}.idx").write_bytes(b"x" * 99), "is not the index of a Megatron"),
    "ids": (lambda here, _: rewrite(here, 300), "document 0: token id 300 is not one of the model. Legal: 0 to 256"),
    "negative": (lambda here, _: rewrite(here, -1), "document 0: token id -1 is not one of the model"),
    "short": (lambda here, _: rewrite(here, 65, tokens=100), "shorter than a batch: its 100 tokens are 3 samples"),
}


def rewrite(prefix: Path, last: int, tokens: int = 1_000) -> None:
    """The corpus becomes one document of ids that fit, but for the last."""
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    ids = np.full(tokens, 65)
    ids[-1 if tokens < 500 else tokens // 2] = last
    builder.add_document(ids, [tokens])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_corpus_that_cannot_be_trained_on_ends_the_command_with_a_sentence(kind, parts, tmp_path, capsys):
    damage, words = DAMAGE[kind]
    for file in parts.glob("web.*"):
        shutil.copy(file, tmp_path)
    damage(tmp_path / "web", parts)
    tiny = ["model=tiny", "model.hidden_size=32", "data.sequence_length=32", "train.global_batch=16", "train.steps=4"]
    where = [f"data.train={tmp_path}/web", f"run.dir={tmp_path}/run", "run.device=cpu", "logging.console=quiet"]
    assert main(["train", *tiny, *where, "train.microbatch=4"]) == 1
    told = capsys.readouterr().err
    assert words in told, told
    assert "Traceback" not in told
    assert not list(tmp_path.glob("run/checkpoints/step_*")), "something was saved"
