"""scripts/bench/precision_gemm.py on the CPU: what it measures, that who is wrong has no time, and that it claims nothing."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from nemohybrid.precision.recipe import RECIPES

BENCH = Path(__file__).parents[2] / "scripts/bench"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("precision_gemm")


def test_a_rehearsal_goes_through_all_shapes_and_claims_nothing(bench, tmp_path, capsys):
    assert bench.main(["--rehearse", "--out", str(tmp_path / "out.json")]) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "A rehearsal: none of these figures measures anything." in printed
    assert "times as fast" not in printed
    assert "fp8_block     not torch_native: torch multiplies blocks of 128" in printed
    assert written["machine"]["rehearsal"] == "True"
    assert len(written["shapes"]) == len(bench.shapes_of("tiny"))
    for shape in written["shapes"]:
        assert set(shape["layer_ms"]) == {"bf16", "torch_native"}
        assert set(shape["product_ms"]) == {"bf16", "torch_native", "fast accumulation"}
        assert shape["errors"]["torch_native"] < 1e-3


def test_shapes_of_the_8b_are_all_its_products(bench):
    """Nemotron-H-8B (arXiv 2504.03624): 24 Mamba-2 layers, 24 MLPs, 4 of attention."""
    found = {(shape.outputs, shape.inputs): shape.count for shape in bench.shapes_of("nemotron_h_8b")}
    assert found == {
        (18560, 4096): 24,
        (4096, 8192): 24,
        (21504, 4096): 24,
        (4096, 21504): 24,
        (6144, 4096): 4,
        (4096, 4096): 4,
    }


def test_who_is_wrong_has_no_time_and_ends_with_an_error(bench, monkeypatch, capsys):
    def off(gemm):
        return lambda x, w, b: gemm(x, w, b) * 1.01

    native = bench.BACKENDS["torch_native"]
    wrong = type(native)("torch_native", native.obstacle, lambda recipe, slot: off(native.gemm(recipe, slot)))
    monkeypatch.setitem(bench.BACKENDS, "torch_native", wrong)
    shape = bench.shapes_of("tiny")[-1]
    result = bench.measure(shape, RECIPES["fp8_current"], ["torch_native"], 32, CPU, 1)
    assert set(result.layer_ms) == {"bf16"}
    assert "from the emulation" in result.faults["torch_native"]
    assert bench.main(["--rehearse", "--recipes", "fp8_current"]) == 1
    assert "from the emulation" in capsys.readouterr().out


def test_layers_count_as_often_as_the_model_has_them(bench):
    def result(count, bf16, native):
        return bench.Result("M", 1, 1, count, 1, "fp8_current", {"bf16": bf16, "torch_native": native})

    (line,) = bench.summary([result(3, 2.0, 1.0), result(1, 2.0, 1.0)], rehearsal=False)
    assert line == "fp8_current by torch_native: layers 2.00 times as fast as in bf16, aim 1.5"
    (line,) = bench.summary([result(3, 2.0, 1.0), result(1, 2.0, 5.0)], rehearsal=False)
    assert "layers 1.00 times as fast" in line


def test_it_measures_no_cpu(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds none"):
        bench.main([])
