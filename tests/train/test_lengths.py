"""Steps of several sequence lengths, and rows whose tokens ranks share, in a run."""

import json

import pytest
import torch

from nemohybrid.errors import CheckpointError
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.collectives import gather_json
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.data import RunData
from nemohybrid.train.trainer import Trainer

LENGTHS = "data.lengths={32: 0.75, 8: 0.25}"


def test_each_length_reads_its_own_samples_one_after_the_other(configure):
    """And every step as many tokens: 4 sequences of 32, or 16 of 8."""
    data = RunData(configure(LENGTHS, "train.steps=12"), ParallelContext.single())
    vocabulary = data.config.model.vocab_size
    seen = {32: 0, 8: 0}
    for step in range(1, 13):
        tokens = data.batch(step).tokens
        length, rows = tokens.shape[1], tokens.shape[0]
        assert rows * length == 128
        want, _, _ = data.mixtures[length].batch(seen[length], seen[length] + rows, vocabulary)
        assert torch.equal(tokens, want)
        seen[length] += rows
    assert seen == {32: 9 * 4, 8: 3 * 16}


@pytest.mark.parametrize("step", [1, 4])
def test_ranks_share_rows_of_every_length(configure, step):
    """Two data ranks of two context ranks each; the order of ranks is that of rows, then of tokens."""
    config = configure(LENGTHS, "train.steps=12")
    whole = RunData(config, ParallelContext.single()).batch(step)
    found = []
    for rank in range(4):
        groups = {"data": Group(4, rank), "context": Group(2, rank % 2)}
        found.append(RunData(config, ParallelContext(torch.device("cpu"), **groups)).batch(step))
    for name in ("tokens", "labels", "loss_mask"):
        parts = [getattr(batch, name) for batch in found]
        rows = [torch.cat(parts[first : first + 2], 1) for first in (0, 2)]
        assert torch.equal(torch.cat(rows), getattr(whole, name)), name


def test_a_run_of_two_lengths_stops_and_goes_on(start, tmp_path):
    """Bit for bit; its metrics say which length a step had, and the score by position has a picture."""
    words = [LENGTHS, "train.steps=6", "train.evaluate_every=6", "train.evaluate_positions=true", "train.microbatch=2"]
    start(*words, f"run.dir={tmp_path}/straight")
    start(*words, "train.stop_at=3")
    start(*words)
    straight, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    assert [r["loss"] for r in straight if "loss" in r] == [r["loss"] for r in resumed if "loss" in r]
    assert [r["sequence_length"] for r in straight if "loss" in r].count(8) == 1
    scores = next(r["position_loss"] for r in straight if "position_loss" in r)
    assert [last for last, _, _ in scores] == [0, 1, 3, 7, 15, 31]
    total = next(r["val_loss"] for r in straight if "val_loss" in r)
    assert scores[-1][2] == pytest.approx(total, rel=1e-6), "the mean up to the last position is the loss"
    assert (tmp_path / "straight" / "position_loss.png").is_file()
    with pytest.raises(CheckpointError, match=r"data\.lengths"):
        start("train.steps=8")


def test_context_ranks_score_what_one_rank_scores(configure, on_ranks):
    """Windows that do not divide, MTP drafts, positions: 700 characters in windows of 30."""
    words = [
        'model.pattern="M-*/*"',
        "data.sequence_length=30",
        "train.evaluate_every=1",
        "train.evaluate_positions=true",
    ]
    config = configure(*words)
    alone = Trainer(config, ParallelContext.single(), []).evaluate()

    def scored(rank, folder):
        ranks = Group(2, rank, torch.distributed.group.WORLD)
        context = ParallelContext(torch.device("cpu"), rank, 2, data=ranks, context=ranks)
        found = Trainer(config, context, []).evaluate()
        rest = [list(found.mtp_acceptance), [score.loss for score in found.positions]]
        assert gather_json(found.val_loss, ranks, context.device) == [found.val_loss] * 2
        (folder / f"score{rank}").write_text(json.dumps([found.val_loss, found.val_bits_per_byte, *rest]))

    for got in on_ranks(2, scored):
        assert got[0] == pytest.approx(alone.val_loss, rel=1e-6)
        assert got[1] == pytest.approx(alone.val_bits_per_byte, rel=1e-6)
        assert got[2] == pytest.approx(list(alone.mtp_acceptance), abs=1e-9)
        assert got[3] == pytest.approx([score.loss for score in alone.positions], rel=1e-5, nan_ok=True)


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(2, action)` runs action(rank, folder) on forked Gloo ranks -> what they wrote to `score{rank}`."""
    from forked import run_world

    def go(ranks, action):
        folder = tmp_path / "world"
        folder.mkdir()
        failures = run_world(ranks, lambda rank: action(rank, folder), folder)
        assert not failures, failures[0].read_text()
        return [json.loads((folder / f"score{rank}").read_text()) for rank in range(ranks)]

    return go
