"""The loss by position, against a loop over tokens."""

import math

import pytest
import torch

from nemohybrid.observe.position_loss import draw_position_loss
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.position_loss import PositionLosses


def test_each_token_counts_in_the_run_of_its_position():
    generator = torch.Generator().manual_seed(0)
    losses, mask = torch.rand(3, 20, generator=generator), (torch.rand(3, 20, generator=generator) < 0.7).float()
    positions = torch.arange(20).expand(3, -1) % torch.tensor([[20], [7], [13]])
    found = PositionLosses(20, torch.device("cpu"))
    for rows in (slice(0, 2), slice(2, 3)):
        found.add(losses[rows], mask[rows], positions[rows])
    scores = found.scores(ParallelContext.single())
    assert [(score.first, score.last) for score in scores] == [(0, 0), (1, 2), (3, 6), (7, 14), (15, 30)]
    for score in scores:
        for first, want in ((score.first, score.loss), (0, score.cumulative)):
            kept = (mask > 0) & (positions >= first) & (positions <= score.last)
            assert want == pytest.approx(losses[kept].mean().item())


def test_no_token_has_no_loss():
    found = PositionLosses(4, torch.device("cpu"))
    found.add(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]))
    scores = found.scores(ParallelContext.single())
    assert scores[0].loss == 1.0
    assert math.isnan(scores[1].loss)
    assert scores[-1].cumulative == 1.0


def test_the_picture_needs_no_score_everywhere(tmp_path):
    draw_position_loss({"step 1": [(0, 3.0, 3.0), (2, math.nan, 3.0)], "step 2": []}, tmp_path / "a.png", "a run")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
