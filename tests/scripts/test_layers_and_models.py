"""scripts/bench/kernels/layers.py and models.py on the CPU: what a side that is missing, wrong or too large comes to."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from nemohybrid.config.accounting import TRAINING_PASSES, layer_cost, total_cost
from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.interop.hf.config_out import config_json
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.linear import Linear
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.precision.backends.torch_native import NativeGemm
from nemohybrid.precision.gemm import plain_gemm
from nemohybrid.precision.place import ROLES
from nemohybrid_kernels.mixer import mamba2_mixer

BENCH = Path(__file__).parents[2] / "scripts/bench/kernels"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """`bench("layers")`: a module of scripts/bench/kernels."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def no_transformers(bench, monkeypatch):
    def missing(*_):
        raise bench("sides").Missing("transformers is not here")

    for name in ("layers", "models"):
        monkeypatch.setattr(bench(name), "hf_model", missing)


@pytest.fixture
def peer(bench):
    """An operator with the arguments of mamba-ssm's, computed by our reference."""

    def split(zxbcdt, conv, bias, dt_bias, A, D, chunk, **named):
        assert (named["norm_before_gate"], named["seq_idx"]) == (False, None)
        state = (conv.shape[0] - named["headdim"] * len(A)) // 2 // named["ngroups"]
        group_size = named["rmsnorm_weight"].numel() // named["ngroups"]
        sizes = {"heads": len(A), "groups": named["ngroups"], "state": state, "group_size": group_size}
        weights = conv, bias, dt_bias, A, D, named["rmsnorm_weight"]
        return mamba2_mixer(zxbcdt, *weights, **sizes, eps=named["rmsnorm_eps"], chunk_size=chunk, backend="torch")

    return bench("peer").Peer("9.9", "nobody", *[None] * 3, split)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return load_config(
        ["model=tiny", "data=shakespeare", "train.global_batch=2", "data.sequence_length=64", f"run.dir={tmp_path}/run"]
    )


def test_the_operator_of_mamba_ssm_stands_in_the_place_of_our_mixer_and_goes_again(bench, peer):
    sides, layers = bench("sides"), bench("layers")
    model = HybridModel.create(layers.only("tiny", "M", "float32"))
    x = torch.randn(32, model.config.hidden_size)

    def output() -> torch.Tensor:
        return model.layers.get_submodule("0")(x, SequenceContext(1, 32))

    words = sides.of_peer(peer, 16)(model, CPU, torch.float32)
    assert "mamba2_mixer: mamba-ssm 9.9" in words
    assert not [word for word in words if word.startswith("ssd_scan")]
    mixer = model.layers.get_submodule("0").get_submodule("mixer")
    theirs = output()
    sides.ours(model, CPU, torch.float32)
    assert "_all_at_once" not in vars(mixer), "the operator of the peer stays in the layer"
    torch.testing.assert_close(theirs, output(), rtol=1e-4, atol=1e-5)


def test_layers_are_timed_and_who_is_missing_is_said(bench, no_transformers, tmp_path, monkeypatch, capsys):
    layers = bench("layers")
    monkeypatch.setattr(layers, "TINY", (("tiny", "M"), ("tiny", "-")))
    monkeypatch.setattr(layers, "find_peer", lambda: (None, "no mamba-ssm"))
    assert layers.main(["--rehearse", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    by_side = {(entry["layer"], entry["side"]): entry for entry in found["layers"]}
    for side in (("M", "ours"), ("M", "torch"), ("-", "ours")):
        assert by_side[side]["tokens_per_second"] > 0, side
    assert by_side["M", "mamba-ssm"]["fault"] == "mamba-ssm is not here"
    assert by_side["-", "transformers"]["fault"] == "transformers is not here"
    config = layers.only("tiny", "-", "float32")
    per_token = TRAINING_PASSES * layer_cost("-", config, 32).flops
    entry = by_side["-", "ours"]
    assert entry["model_flops_per_second"] == pytest.approx(per_token * entry["tokens_per_second"])
    assert "mamba-ssm is not here" in capsys.readouterr().out


def test_a_layer_that_computes_something_else_has_no_time(bench, no_transformers, peer):
    layers = bench("layers")
    good = peer.split
    object.__setattr__(peer, "split", lambda *arguments, **named: 1.1 * good(*arguments, **named))
    job = layers.Job("M", layers.only("tiny", "M", "float32"), 32, CPU, 1)
    (wrong,) = [result for result in layers.measure("tiny", job, peer) if result.side.startswith("mamba-ssm")]
    assert wrong.tokens_per_second is None
    assert "wrong: output is off by" in wrong.fault


def test_what_does_not_fit_is_recomputed_and_then_given_up(bench, config):
    models = bench("models")
    tried = []

    def make_step(fits: str):
        def make(recompute: str):
            tried.append(recompute)
            if recompute != fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return lambda: 5.0

        return make

    result = models.attempts(models.Result("tiny", "ours"), make_step("layer"), config, CPU)
    assert tried == ["none", "layer"]
    assert (result.recompute, result.fault, len(result.seconds)) == ("layer", None, models.STEPS)
    result = models.attempts(models.Result("tiny", "ours"), make_step("never"), config, CPU)
    assert result.fault == "it does not fit into the memory of this GPU"
    assert result.tokens_per_second is None


def test_models_train_by_every_side_there_is(bench, no_transformers, monkeypatch, tmp_path, capsys):
    models = bench("models")
    monkeypatch.setattr(models, "find_peer", lambda: (None, "no mamba-ssm"))
    assert models.main(["--rehearse", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [entry["side"] for entry in found] == ["ours", "mamba-ssm", "torch", "ours, fp8_current", "transformers"]
    faults = [None, "mamba-ssm is not here", None, None, "transformers is not here"]
    assert [entry["fault"] for entry in found] == faults
    assert any(word.startswith("fp8_current: torch_native") for word in found[3]["backends"])
    printed = capsys.readouterr().out
    assert "no MFU" in printed
    assert "times as fast" not in printed, "a CPU says nothing of speed"
    assert found[0]["losses"][-1] < found[0]["losses"][0]


def test_a_side_in_fp8_leaves_plain_products_to_the_next(bench, config):
    sides = bench("sides")
    trainer = bench("models").Trainer(config, ParallelContext.single(CPU), [])
    sides.in_recipe("fp8_current")(trainer.model, CPU, torch.float32)
    linears = [module for module in trainer.model.modules() if isinstance(module, Linear) and module.role in ROLES]
    assert all(isinstance(linear.gemm, NativeGemm) for linear in linears)
    sides.ours(trainer.model, CPU, torch.float32)
    assert all(linear.gemm is plain_gemm for linear in linears)


def test_fp8_is_compared_with_ours_in_bf16(bench, tmp_path):
    models = bench("models")
    report = models.Report({}, None, 1.0)
    for side, rate in (("ours", 100.0), ("torch", 10.0), (models.IN_FP8, 140.0)):
        result = models.Result(
            "a", side, tokens_per_second=rate, model_flops_per_second=1.0, losses=[1.0], peak_bytes=1
        )
        report.add(result)
    assert "a: 1.40 times as fast in FP8, aim 1.3" in models.verdict(report)


def test_late_sides_are_left_out_and_said(bench, no_transformers, monkeypatch, capsys):
    models = bench("models")
    monkeypatch.setattr(models, "find_peer", lambda: (None, "no mamba-ssm"))
    assert models.main(["--rehearse", "--seconds", "0"]) == 0
    assert "left out for want of time: tiny with ours; tiny with mamba-ssm" in capsys.readouterr().out


def test_every_layer_that_is_timed_on_a_gpu_can_be_built_by_both(bench):
    layers = bench("layers")
    for name, symbol in layers.LAYERS:
        config = layers.only(name, symbol, "bfloat16")
        with torch.device("meta"):
            ours = HybridModel(config)
        assert config_json(config, torch.bfloat16)["num_hidden_layers"] == 1, (name, symbol)
        assert sum(p.numel() for p in ours.layers.parameters()) == layer_cost(symbol, config, 8192).parameters


def test_the_page_says_what_the_models_are(bench, tmp_path):
    models = bench("models")
    page = (BENCH.parents[2] / "docs/benchmarks/kernels_models.md").read_text()
    for name, overrides in models.MODELS.items():
        config = load_config([*models.JOB, *overrides, f"run.dir={tmp_path}/{name}"])
        rows, length = config.train.global_batch, config.data.sequence_length
        cost = total_cost(config.model, length)
        step = TRAINING_PASSES * cost.flops * rows * length
        row = f"| {cost.parameters / 1e9:.2f} billion | {rows} x {length} | {step / 1e12:.0f} |"
        assert row in page, f"{name}: {row}"
    assert f"The bar for ours is {models.BAR:.0%} MFU, the aim {models.AIM:.0%}.".replace("%", " %") in page
