"""What quantizing loses is in the run folder, of the steps that are sampled and of no other."""

import json

import pytest
import torch

from nemohybrid.config.compose import load_config
from nemohybrid.model.linear import Linear
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.callbacks.precision_health import FILE, summed_up
from nemohybrid.train.run import run


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["nvfp4", "mor"])
def test_a_run_tells_what_its_formats_lose(tmp_path, recipe):
    words = ["model=tiny", "model.pattern='*-'", "data=shakespeare", "data.tokenizer=byte", "data.sequence_length=32"]
    words += ["train.steps=4", "train.global_batch=2", "train.microbatch=1", "logging.precision_every=3"]
    run(load_config([*words, f"precision.recipe={recipe}", f"run.dir={tmp_path}"]), ParallelContext.single())
    lines = records(tmp_path / FILE)
    assert [line.pop("step") for line in lines] == [1, 3]
    figures = {"accepted"} if recipe == "mor" else {"underflow", "saturated", "error", "scale_spread"}
    products = [
        f"layers.{layer}.mixer.{role}"
        for layer, roles in enumerate((("qkv", "out_proj"), ("fc1", "fc2")))
        for role in roles
    ]
    wanted = {
        f"{product}.{tensor}/{figure}" for product in products for tensor in ("x", "w", "dy") for figure in figures
    }
    assert all(set(line) == wanted for line in lines)
    seen = [
        {name for name in record if name.startswith("precision_")} for record in records(tmp_path / "metrics.jsonl")
    ]
    assert [bool(names) for names in seen] == [True, False, True, False]
    if recipe == "nvfp4":
        assert all(0.05 < value < 0.3 for name, value in lines[0].items() if name.endswith("/error"))


def test_what_is_not_finite_is_named_though_fp8_hides_it(tmp_path, monkeypatch):
    """An infinite input is cut off at the largest number, and the loss stays finite."""
    words = ["model=tiny", "model.pattern='*-'", "data=shakespeare", "data.tokenizer=byte", "data.sequence_length=32"]
    words += ["train.steps=1", "train.global_batch=1", "logging.precision_every=1", "precision.recipe=fp8_current"]
    real = Linear.forward

    def spoilt(linear, x):
        return real(linear, x.index_fill(0, torch.tensor([3]), torch.inf) if linear.role == "fc2" else x)

    monkeypatch.setattr(Linear, "forward", spoilt)
    run(load_config([*words, f"run.dir={tmp_path}"]), ParallelContext.single())
    (line,) = records(tmp_path / FILE)
    assert line["not_finite"][0] == "layers.1.mixer.fc2.x"


def test_weights_are_seen_also_after_an_evaluation_has_quantized_them(start, tmp_path):
    words = ["precision.recipe=fp8_current", "precision.backend=emulated", "train.steps=3", "train.evaluate_every=2"]
    start(*words, "logging.precision_every=3")
    first, third = records(tmp_path / "run" / FILE)
    assert first.keys() == third.keys()
    assert "layers.1.mixer.fc1.w/error" in third


def test_figures_are_summed_up_over_layers():
    figures = {"layers.0.fc1.x/error": 0.1, "layers.1.fc1.x/error": 0.3, "layers.0.fc1.w/error": 0.2}
    assert summed_up(figures) == {
        "precision_error/x": pytest.approx(0.2),
        "precision_error_worst/x": 0.3,
        "precision_error/w": 0.2,
        "precision_error_worst/w": 0.2,
    }
