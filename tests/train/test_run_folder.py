"""What a run leaves in its folder, and what it computes on the way."""

import contextlib
import fcntl
import json
import math
import os
import pty
import shutil
import struct
import sys
import termios
import warnings

import matplotlib.image
import numpy as np
import pytest
import torch

from nemohybrid.config.accounting import TRAINING_PASSES, total_cost
from nemohybrid.data.tokenizer import load_tokenizer
from nemohybrid.errors import ConfigError, DataError
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.world import choose_device
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer

WHOLE = ["logging.picture=true", "train.evaluate_every=3", "sample.prompts=[ROMEO,J]", "sample.max_new_tokens=5"]


@pytest.fixture
def records(start, tmp_path):
    """The lines of `metrics.jsonl` after a run of four steps with everything switched on."""
    trainer = start(*WHOLE)
    return trainer, [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_metrics_picture_samples_checkpoint_and_configuration(records, tmp_path):
    _, lines = records
    folder = tmp_path / "run"
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 4], "every third step and the last"
    promised = {"step", "loss", "grad_norm", "lr", "batch", "tokens", "seconds", "tokens_per_second", "bits_per_byte"}
    promised |= {"model_flops_per_second", "model_flops_per_second_megatron", "mfu", "memory_host_gib"}
    assert promised <= steps[0].keys()
    assert set(lines[-1]) == {"step", "val_loss", "val_bits_per_byte"}
    assert [line["tokens"] for line in steps] == [128, 256, 384, 512]
    picture = matplotlib.image.imread(folder / "loss.png")
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10, "the picture shows nothing"
    samples = (folder / "samples.txt").read_text()
    assert "ROMEO" in samples
    assert "sample 2" in samples
    checkpoint = {p.name for p in (folder / "checkpoints" / "step_00000004").iterdir()}
    assert {"manifest.json", "config.yaml", "tokenizer.json"} <= checkpoint
    assert (folder / "config.yaml").read_text() == (folder / "checkpoints/step_00000004/config.yaml").read_text()


def test_throughput_is_what_its_numbers_say(records):
    trainer, lines = records
    cost = total_cost(trainer.config.model, 32)
    for line in (line for line in lines if "loss" in line):
        assert line["tokens_per_second"] == pytest.approx(128 / line["seconds"])
        flops = line["tokens_per_second"] * TRAINING_PASSES * cost.flops
        assert line["model_flops_per_second"] == pytest.approx(flops)
        assert line["mfu"] is None, "a CPU has no known peak"
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2), rel=1e-2), "bytes are tokens here"


def test_mfu_is_the_share_of_the_given_peak(start, tmp_path):
    start("cluster.peak_tflops=2", "train.steps=1")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["mfu"] == pytest.approx(line["model_flops_per_second"] / 2e12)


@pytest.mark.parametrize("overlap", [0, 8])
def test_evaluation_scores_each_token_once_and_bits_per_byte_is_right(configure, overlap, corpus):
    """By hand: every token but the first, predicted from its window; the bytes are those of the text but the first."""
    config = configure(f"data.valid_overlap={overlap}", "train.microbatch=3", "train.global_batch=3")
    trainer = Trainer(config, ParallelContext.single(), [])
    text = (corpus / "valid.txt").read_bytes()
    ids = [*text, 256]
    nats, scored = 0.0, 0
    for start in range(0, len(ids) - 1, 32 - overlap):
        window = torch.tensor([ids[start : start + 33]])
        with torch.no_grad():
            logits = trainer.model(window[:, :-1], SequenceContext(1, window.shape[1] - 1)).double()
        losses = torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="none")
        fresh = losses[overlap if start else 0 :]
        nats, scored = nats + fresh.sum().item(), scored + len(fresh)
        if start + 33 >= len(ids):
            break
    assert scored == len(ids) - 1, "the check itself must score each token once"
    got = trainer.evaluate()
    assert got.val_loss == pytest.approx(nats / scored, rel=1e-5)
    assert got.val_bits_per_byte == pytest.approx(nats / math.log(2) / (len(text) - 1), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_in_both_dtypes_and_weights_stay_fp32(start, tmp_path, dtype):
    trainer = start(f"model.dtype={dtype}", "train.steps=15", "optim.lr=3e-3")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(257), abs=0.1), "an untrained model knows nothing"
    assert losses[-1] < losses[0] - 1
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}, "master weights"


def test_recomputing_layers_gives_the_same_run_bitwise(start, tmp_path):
    for way in ("none", "layer"):
        start(f"train.recompute={way}", f"run.dir={tmp_path}/{way}")
    none, layer = (read_metrics(tmp_path / way / "metrics.jsonl") for way in ("none", "layer"))
    assert [(r["loss"], r["grad_norm"]) for r in none] == [(r["loss"], r["grad_norm"]) for r in layer]


def test_a_batch_ramp_trains_on_growing_batches(start, tmp_path):
    ramp = ["train.batch_ramp.start=1", "train.batch_ramp.increment=1", "train.batch_ramp.samples=6"]
    start(*ramp, "train.microbatch=1", "train.steps=6")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["batch"] for line in lines] == [1, 1, 2, 3, 4, 4]
    assert [line["tokens"] for line in lines] == [32 * n for n in (1, 2, 4, 7, 11, 15)]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_the_run(start):
    with pytest.raises(ConfigError, match=r"model\.vocab_size=257 or more"):
        start("model.vocab_size=256")


def test_it_is_refused_too_where_only_the_loaded_tokenizer_tells(start, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("nemohybrid.config.rules.surroundings.tokenizer_vocabulary", lambda _: None)
    for end in ("bin", "idx"):  # a corpus of another program: nothing beside it says how it was made
        shutil.copy(corpus / f"train.{end}", tmp_path / f"bare.{end}")
    load_tokenizer("byte").save(tmp_path / "tokenizer")
    bare = [f"data.train={tmp_path}/bare", "data.valid=null", f"data.tokenizer={tmp_path}/tokenizer"]
    with pytest.raises(DataError, match=r"model\.vocab_size=257"):
        start(*bare, "model.vocab_size=256")


def test_asking_for_an_absent_gpu_is_a_users_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="Legal: cpu, auto"):
        choose_device("cuda", 0)
    assert choose_device("auto", 0) == torch.device("cpu")


def test_plain_lines_tell_loss_speed_and_time_left(start, capsys):
    start("logging.console=lines", "logging.every=2", "train.evaluate_every=4")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step ") and "eta" in line]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "4/4"]
    assert all(word in lines[0] for word in ("loss", "bits/byte", "lr", "tok/s"))
    assert "validation loss" in out
    assert "run/metrics.jsonl" in out, "the end says where everything is"


def test_a_bar_on_a_terminal_moves_to_the_end(start, capsys):
    start("logging.console=bar")
    assert "4/4" in capsys.readouterr().err


def test_on_a_terminal_a_bar_is_shown_and_closed_before_the_samples(configure, tmp_path):
    """In a child with a real pseudo-terminal, whose window has a size; without one there must be lines."""
    for rows, expected in ((40, "2/2 ["), (0, "step 2/2")):
        seen = terminal_output(rows, configure, tmp_path / str(rows))
        assert expected in seen, seen
        assert seen.rindex(expected) < seen.index("----- sample 1"), seen


def terminal_output(rows: int, configure, folder) -> str:
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside torch's idle threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child, terminal = pty.fork()
    if child == 0:
        try:
            fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 120 if rows else 0, 0, 0))
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            more = ["train.steps=2", "logging.console=auto", "sample.prompts=[J]", "sample.max_new_tokens=2"]
            run(configure(*more, f"run.dir={folder}"), ParallelContext.single())
            sys.stdout.flush()
        finally:
            os._exit(0)
    pieces = []
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    os.waitpid(child, 0)
    os.close(terminal)
    return b"".join(pieces).decode(errors="replace")
