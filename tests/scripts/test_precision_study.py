"""The study of precisions: its table, its gates, and one tiny run of it."""

import importlib
import json
from pathlib import Path

import pytest

from nemohybrid.precision.recipe import RECIPES


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "bench"))
        yield importlib.import_module("precision_study")


def results(**losses):
    return [
        {"arm": arm, "seed": seed, "val_loss": loss, "steps": 5}
        for arm, of in losses.items()
        for seed, loss in enumerate(of)
    ]


def test_gaps_are_those_of_the_same_seed_and_gates_are_of_their_mean(study):
    found = results(bf16=[2.0, 4.0], fp8_current=[2.01, 4.01], nvfp4=[2.1, 4.0])
    rows = dict(zip(("bf16", "fp8_current", "nvfp4"), study.table(found)[2:], strict=True))
    assert "| +0.37 % | +0.25 % | +0.50 % | 2 | 0.5 % kept |" in rows["fp8_current"]
    assert rows["nvfp4"].endswith("| +2.50 % | +0.00 % | +5.00 % | 2 | 2 % missed |")
    assert study.table([]) != study.table(found)


def test_rounding_at_random_takes_away_bias_and_adds_noise(study):
    """dx and dW, one draw and the mean of 64: what the recipe is for."""
    (nearest, same, *_), (one, mean, _, of_weights) = (study.biases(RECIPES[name]) for name in ("nvfp4_no_sr", "nvfp4"))
    assert nearest == pytest.approx(same)
    assert one > nearest
    assert mean < nearest / 3
    assert of_weights < nearest / 3


@pytest.mark.slow
def test_a_run_leaves_its_loss_and_is_not_run_again(study, tmp_path, capsys):
    words = ["--output", str(tmp_path), "--arms", "bf16", "nvfp4", "--seeds", "1", "--steps", "2"]
    words += ["train.global_batch=1", "data.sequence_length=32", "data.tokenizer=byte", "model.pattern='*-'"]
    assert study.main(words) == 0
    first = capsys.readouterr().out
    assert "nvfp4, seed 1: " in first
    losses = {of["arm"]: of["val_loss"] for of in study.found(tmp_path)}
    assert losses["nvfp4"] != losses["bf16"]
    assert json.loads((tmp_path / "nvfp4-1" / "precision.json").read_text())["recipes"]["nvfp4"]
    assert study.main(words) == 0
    assert "seed 1: " not in capsys.readouterr().out
