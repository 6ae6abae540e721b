"""scripts/gpu_tables.py on what the benchmarks write: their own classes, so that a field that is renamed shows here."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def module(monkeypatch):
    """`module("layers")`: of scripts/, or of the benchmarks there."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench/kernels"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def outcome(module, tmp_path):
    """`outcome("layers", layers=[...])`: of a file with these entries."""

    def read(name: str, left_out=(), peer="mamba-ssm 9.9", **entries):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"machine": {"peer": peer}, "left_out": list(left_out), **entries}))
        tables = module("gpu_tables")
        return tables.read(file, getattr(tables, name))

    return read


def test_kernels_show_the_main_sizes_and_every_bar_that_was_missed(module, outcome):
    line = module("against_mamba").Line
    times = {"ours": 1.5, "mamba-ssm, chunk 256": 3.0, "torch": 30.0}
    fast = {"ratio": 2.0, "peer": "mamba-ssm, chunk 256", "bar": 1.3, "verdict": "pass", "milliseconds": times}
    entries = [
        line("middle", "8192 tokens", "both", **fast),
        line("middle", "2048 tokens", "both", **fast | {"ratio": 0.9, "bar": 1.0, "verdict": "FAIL"}),
        line("scan", "2048 tokens", "both", faults={"ours": "wrong: output"}, bar=1.0, verdict="FAIL"),
    ]
    found = outcome("kernels", lines=[asdict(entry) for entry in entries])
    assert found.figures == {"bars": "1 of 3 passed"}
    assert found.lines == [
        "peer: mamba-ssm 9.9",
        "middle  both     ours 1.500 ms, mamba-ssm, chunk 256 3.000 ms, torch 30.000 ms"
        "  2.00 times as fast as mamba-ssm, chunk 256",
        "scan    both     2048 tokens: ours has no time: wrong: output",
        "FAIL: middle both at 2048 tokens: 0.90, bar 1.0",
    ]


def test_the_roofline_of_a_whole_mixer_is_shown_kernel_by_kernel(module, outcome):
    bench, counts = module("roofline"), module("counts")
    timed = [
        bench.Timed(counts.Kernel(name, 1e6, 1e9), seconds, (seconds, seconds), 2e-5)
        for name, seconds in (("scan", 2e-5), ("conv", 8e-5))
    ]
    cases = [bench.Found("mixer whole", timed), bench.Found("loss", fault="OutOfMemoryError: no")]
    report = bench.report({}, None, cases, ["norm"])
    found = outcome("roofline", cases=report["cases"], left_out=report["left_out"])
    assert found.figures == {"of_roofline": pytest.approx(0.4)}
    assert found.lines == [
        "peer: mamba-ssm 9.9",
        "mixer whole                     100.0 us   40% of roofline",
        "  scan                           20.0 us  100% of roofline",
        "  conv                           80.0 us   25% of roofline",
        "loss: OutOfMemoryError: no",
        "left out for want of time: 1, named in roofline.json",
    ]


def test_layers_and_models_show_every_side(module, outcome):
    measured = {"tokens_per_second": 1.2e6, "model_flops_per_second": 4.5e14, "mfu": 0.455, "peak_bytes": 3 * 2**30}
    layers = module("layers").Result
    sides = [layers("nemotron_h_8b", "M", "ours", **measured), layers("nemotron_h_8b", "M", "torch", fault="no room")]
    found = outcome("layers", layers=[asdict(side) for side in sides])
    assert found.figures == {"median_mfu": 0.455}
    shown = [" ".join(line.split()) for line in found.lines]
    assert shown[1:] == [
        "nemotron_h_8b M ours 1,200,000 tokens/s 450.0 TFLOP/s 46% MFU, 3.00 GiB",
        "nemotron_h_8b M torch no room",
    ]
    models = module("models").Result
    sides = [models("hybrid_1b", "ours", recompute="layer", **measured), models("hybrid_1b", "torch", fault="no room")]
    found = outcome("models", models=[asdict(side) for side in sides])
    assert found.figures == {"tokens_per_second": 1.2e6, "mfu": 0.455}
    assert found.lines[1].endswith("46% MFU, 3.00 GiB, recompute layer")
    assert "no room" in found.lines[2]


def test_products_in_low_precision_count_as_often_as_the_model_has_them(module, outcome, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    result = module("precision_gemm").Result
    shapes = [
        result("- fc1", 21504, 4096, 3, 8192, "fp8_current", {"bf16": 4.0, "torch_native": 2.0}),
        result("M in_proj", 18560, 4096, 1, 8192, "fp8_current", {"bf16": 4.0, "torch_native": 8.0}),
        result("* qkv", 6144, 4096, 1, 8192, "fp8_current", {"bf16": 1.0}, faults={"torch_native": "is 1.0e-02 off"}),
    ]
    found = outcome("precision", peer="", shapes=[asdict(shape) for shape in shapes])
    assert found.figures == {"fp8_current by torch_native": "1.14 times bf16"}
    assert found.lines == [
        "fp8_current   - fc1       [21504, 4096]  torch_native 2.000 ms, bf16 4.000 ms  2.00",
        "fp8_current   M in_proj   [18560, 4096]  torch_native 8.000 ms, bf16 4.000 ms  0.50",
        "fp8_current   * qkv       [6144, 4096]  torch_native has no time: is 1.0e-02 off",
    ]
