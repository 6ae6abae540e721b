"""scripts/bench/kernels: rehearsals of what will be measured on a GPU, and its arithmetic. Times are made up here."""

import importlib
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from nemohybrid.plan.hardware import device
from nemohybrid_kernels import launching

BENCH = Path(__file__).parents[2] / "scripts/bench/kernels"
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not launching.interpreted(), reason="a rehearsal is one in Triton's interpreter")


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        names = ("against_mamba", "cases", "counts", "parts", "peer_compile", "roofline", "timing")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture
def line(scripts):
    """Of a part at sizes, forward and backward, judged by this ratio."""

    def judged(sizes, ratio, part=None, faults=()):
        part = part or scripts.parts.MIDDLE
        bar = scripts.against_mamba.bar_of(part, sizes, "both")
        found = scripts.against_mamba.Line(part.name, str(sizes), "both", ratio=ratio, bar=bar, faults=dict(faults))
        found.verdict = scripts.against_mamba.verdict(found)
        return found

    return judged


@interpreted
def test_a_rehearsal_of_the_roofline_times_every_launch_and_says_what_it_counted(scripts, tmp_path, capsys):
    out = tmp_path / "roofline.json"
    assert scripts.roofline.main(["--rehearse", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["machine"]["rehearsal"] == "True"
    assert not written["left_out"]
    launched = {case["case"]: [row["kernel"]["name"] for row in case["timed"]] for case in written["cases"]}
    assert launched["mixer tiny"].count("ssd_decays") == 2  # the backward pass makes them again
    assert {name.split()[0] for name in launched} == {"mixer", "norm", "experts", "loss"}
    rows = [row for case in written["cases"] for row in case["timed"]]
    assert all(row["seconds"] > 0 and row["kernel"]["bytes"] > 0 and row["fraction"] is None for row in rows)
    assert capsys.readouterr().out.count("  together") == len(launched)


@interpreted
def test_a_case_that_cannot_run_is_a_fault_and_the_others_have_times(scripts, tmp_path, capsys, monkeypatch):
    def broken(make):
        raise RuntimeError("out of resources")

    (norm,) = (case for case in scripts.roofline.REHEARSED if case.name == "norm tiny")
    monkeypatch.setattr(scripts.roofline, "plan", lambda rehearse: [replace(norm, name="broken", run=broken), norm])
    assert scripts.roofline.main(["--rehearse", "--out", str(tmp_path / "out.json")]) == 1
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(case["case"], case["fault"], len(case["timed"])) for case in cases] == [
        ("broken", "RuntimeError: out of resources", 0),
        ("norm tiny", None, 2),
    ]
    assert "broken: RuntimeError: out of resources" in capsys.readouterr().out


def test_what_does_not_fit_into_the_seconds_is_named(scripts, tmp_path, capsys):
    assert scripts.roofline.main(["--rehearse", "--seconds", "-1", "--out", str(tmp_path / "out.json")]) == 0
    assert "mixer tiny" in json.loads((tmp_path / "out.json").read_text())["left_out"]
    assert "left out for want of time: mixer tiny" in capsys.readouterr().out


def test_on_a_gpu_the_mixer_comes_first_and_its_parts_by_themselves_last(scripts):
    names = [case.name for case in scripts.roofline.plan(rehearse=False)]
    assert names[0] == "mixer whole"
    assert {name.split()[0] for name in names[-2:]} == {"conv", "ssd"}
    assert {"experts", "loss bf16", "mixer one of 8 ranks"} < set(names)


def test_a_fraction_of_the_roofline_is_the_least_time_by_the_slower_of_memory_and_products(scripts):
    peaks, times = device("H200"), scripts.timing.Times([0.003, 0.002, 0.001])
    memory = scripts.roofline.timed(scripts.counts.Kernel("a", bytes=peaks.memory * 1e-3), times, peaks)
    products = scripts.roofline.timed(scripts.counts.Kernel("a", 1.0, flops=peaks.flops * 5e-4), times, peaks)
    assert (memory.seconds, memory.spread) == (0.002, (0.001, 0.003))
    assert (memory.fraction, products.fraction) == pytest.approx((0.5, 0.25))
    assert " 50%" in scripts.roofline.row(memory.kernel, memory.seconds, memory.least)


def test_without_a_gpu_the_scripts_say_so_and_stop(scripts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in (scripts.roofline, scripts.against_mamba):
        with pytest.raises(SystemExit, match="torch finds none"):
            script.main([])


def test_a_call_alone_has_a_time_for_each_round(scripts):
    calls = []
    assert len(scripts.timing.alone(lambda: calls.append(0), CPU, rounds=3).seconds) == len(calls) == 3


def test_on_a_gpu_each_round_finds_other_data_in_the_cache_and_waits_for_nobody(scripts, monkeypatch):
    def buffer(count, device):
        assert count * 4 > 126e6, "the L2 cache of a B200 holds it"
        return SimpleNamespace(sum=lambda: done.append("other data"))

    done = []
    clock = SimpleNamespace(record=lambda: done.append("clock"), elapsed_time=lambda end: 2.0)
    monkeypatch.setattr(torch, "zeros", buffer)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    times = scripts.timing.alone(lambda: done.append("call"), torch.device("cuda"), rounds=2)
    assert done == ["wait", "sleep", *(["other data", "clock", "call", "clock"] * 2), "wait"]
    assert times.seconds == [0.002, 0.002]


def test_the_bars_are_those_of_the_issue(scripts, line):
    main, slow = scripts.cases.MAIN, replace(scripts.cases.MAIN, tokens=2048)
    assert [line(main, ratio).verdict for ratio in (1.29, 1.3)] == ["FAIL", "pass"]
    assert [line(slow, ratio).verdict for ratio in (0.99, 1.0)] == ["FAIL", "pass"]
    assert line(main, 0.5, part=scripts.parts.SCAN).verdict is None
    assert line(main, None).verdict is None
    assert line(main, None, faults={"ours": "wrong"}).verdict == "FAIL"
    assert line(scripts.cases.TINY, 0.5).verdict is None


def test_the_bars_are_judged_at_all_sizes_of_the_issue(scripts):
    judged = {
        (s.tokens, s.heads, s.groups, s.state, s.packed)
        for part, s in scripts.against_mamba.plan(rehearse=False)
        if scripts.against_mamba.bar_of(part, s, "both")
    }
    lengths = (2048, 8192, 32768)
    whole = {(t, 128, g, n, p) for t in lengths for g in (1, 8) for n in (64, 128, 256) for p in (False, True)}
    assert judged == whole | {(t, 16, 1, 128, False) for t in lengths}


def test_the_summary_names_what_missed_its_bar_and_what_was_not_compared(scripts, line):
    main, short = scripts.cases.MAIN, replace(scripts.cases.MAIN, tokens=2048)
    said = scripts.against_mamba.summary([line(main, 1.5), line(short, 0.9), line(short, None)], ["scan at 5 tokens"])
    assert said == [
        "left out for want of time: scan at 5 tokens",
        "bars met: 1 of 3",
        f"bars MISSED: middle both at {short} (0.90)",
        "bars with nothing to compare with: 1",
    ]


@interpreted
def test_a_rehearsal_of_the_comparison_measures_without_a_peer(scripts, tmp_path, monkeypatch):
    def missing():
        raise scripts.against_mamba.PeerMissing("not here")

    (norm,) = (part for part in scripts.parts.PARTS if part.name == "norm")
    monkeypatch.setattr(scripts.against_mamba, "load", missing)
    monkeypatch.setattr(scripts.against_mamba, "plan", lambda rehearse: [(norm, scripts.cases.TINY)])
    assert scripts.against_mamba.main(["--rehearse", "--out", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["peer"] == "not here"
    assert [(row["direction"], set(row["milliseconds"]), row["verdict"]) for row in written["lines"]] == [
        ("forward", {"ours", "torch"}, None),
        ("both", {"ours", "torch"}, None),
    ]


def test_what_a_tuner_will_try_is_compiled_together_and_only_once_made_so(scripts, monkeypatch):
    from triton.runtime import Autotuner

    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)  # to be put back
    assert scripts.peer_compile.compile_together()
    wrapped = Autotuner.prune_configs
    assert scripts.peer_compile.compile_together()
    assert Autotuner.prune_configs is wrapped


@pytest.mark.parametrize("count, compiled", [(3, [0, 1, 2]), (1, [])])
def test_every_configuration_is_compiled_with_the_arguments_of_the_call(scripts, count, compiled):
    def run(*args, rows, warmup, grid, scale):
        assert open_modes, "compiled by itself"
        assert (args, warmup, grid, scale) == ((5, 6), True, (1,), 2)
        seen.append(rows)

    @contextmanager
    def mode(pool, ignore_errors):
        open_modes.append(pool)
        yield
        open_modes.pop()

    seen, open_modes = [], []
    configs = [SimpleNamespace(all_kwargs=lambda at=at: {"rows": at}) for at in range(count)]
    prune = scripts.peer_compile._compiling(lambda tuner, kwargs: configs, mode)
    tuner = SimpleNamespace(fn=SimpleNamespace(run=run), nargs={"x": 5, "y": 6})
    assert prune(tuner, {"grid": (1,), "warmup": False, "scale": 2}) is configs
    assert seen == compiled
