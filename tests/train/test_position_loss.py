"""The loss by position, against a loop over tokens."""

import math

import pytest
import torch
from matplotlib.figure import Figure

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
    assert [(score.first, score.last) for score in scores] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 19)]
    for score in scores:
        for first, want in ((score.first, score.loss), (0, score.cumulative)):
            kept = (mask > 0) & (positions >= first) & (positions <= score.last)
            assert want == pytest.approx(losses[kept].mean().item())


@pytest.mark.parametrize(
    "longest, lasts", [(1, [0]), (2, [0, 1]), (4, [0, 1, 3]), (8, [0, 1, 3, 7]), (9, [0, 1, 3, 7, 8])]
)
def test_the_last_run_ends_where_rows_end(longest, lasts):
    """Where it began a token before the end, the picture ended in noise, drawn at twice the length."""
    scores = PositionLosses(longest, torch.device("cpu")).scores(ParallelContext.single())
    assert [score.last for score in scores] == lasts


def test_no_token_has_no_loss():
    found = PositionLosses(4, torch.device("cpu"))
    found.add(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]))
    scores = found.scores(ParallelContext.single())
    assert scores[0].loss == 1.0
    assert math.isnan(scores[1].loss)
    assert scores[-1].cumulative == 1.0


def test_the_picture_needs_no_score_everywhere(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    draw_position_loss({"step 1": [(0, 3.0, 3.0), (1, math.nan, 3.0), (3, 1.0, 2.0)], "step 2": []}, tmp_path, "a run")
    lines = drawn[0].axes[0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 3], [4, 1]], [[1, 3], [4, 2]]]
