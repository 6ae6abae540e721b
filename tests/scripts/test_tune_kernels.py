"""scripts/bench/tune_kernels.py: what it tries, what it takes, what it writes, and a rehearsal without a GPU.

Times of a GPU are made up here.
"""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from nemohybrid_kernels import launching
from nemohybrid_kernels.calls import Case
from nemohybrid_kernels.launching import Config

BENCH = Path(__file__).parents[2] / "scripts/bench"
NOW, QUICK, QUICKEST = (Config({"ROWS": rows}, 4, 1) for rows in (16, 32, 64))
CASES = [Case("norm a", lambda make: []), Case("norm b", lambda make: [])]


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        names = {"tuner": "tune_kernels", "spaces": "tuning_spaces", "files": "config_files"}
        yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})


@pytest.fixture
def fastest(scripts):
    """The verdict over three candidates with these milliseconds, each case taking them, and these results."""

    def run(milliseconds, results=None, rounds=3, tried=(NOW, QUICK, QUICKEST)):
        def trial(config, case):
            calls.append((config.tiles["ROWS"], case.name))
            result = (results or {}).get(config.tiles["ROWS"], torch.ones(4))
            if isinstance(result, Exception):
                raise result
            return [result], milliseconds[config.tiles["ROWS"]]

        calls = run.calls = []
        return scripts.tuner.fastest(tried, NOW, CASES, trial, random.Random(0), rounds)

    return run


def test_the_fastest_candidate_is_taken(fastest):
    assert fastest({16: 1.0, 32: 0.9, 64: 0.8}) == QUICKEST


def test_what_is_hardly_faster_is_not_taken(fastest):
    assert fastest({16: 1.0, 32: 0.99, 64: 0.985}) == NOW


def test_a_current_configuration_with_a_fault_gives_way_to_a_slower_one(fastest):
    assert fastest({16: 1.0, 32: 1.5, 64: 1.4}, tried=[QUICK, QUICKEST]) == QUICKEST
    assert fastest({16: 1.0}, tried=[]) == NOW


@pytest.mark.parametrize(
    "result", [torch.full((4,), 1.1), torch.full((4,), torch.nan), RuntimeError("out of resources")], ids=repr
)
def test_a_candidate_with_other_results_is_not_taken_however_fast(fastest, result):
    assert fastest({16: 1.0, 32: 0.9, 64: 0.1}, {64: result}) == QUICK


def test_every_candidate_takes_its_turn_in_every_round_in_changing_order(fastest):
    fastest({16: 1.0, 32: 0.9, 64: 0.8}, rounds=2)
    turns = fastest.calls[-12:]
    assert sorted(turns[:6]) == sorted(turns[6:])
    assert len(set(turns[:6])) == 6
    assert turns[:6] != turns[6:]


def test_every_kernel_of_the_table_has_a_space_of_its_tiles(scripts):
    for architecture, kernels in launching.table().items():
        for kernel, entries in kernels.items():
            for entry in entries:
                current = Config(entry["tiles"], entry["warps"], entry["stages"])
                tried = list(scripts.spaces.candidates(kernel, current))
                assert tried[0] == current
                assert 2 <= len(tried) <= 100, f"{kernel}: {len(tried)} candidates"
                assert all(tried.count(it) == 1 for it in tried)
                assert {frozenset(it.tiles) for it in tried} == {frozenset(current.tiles)}, f"{architecture} {kernel}"


@pytest.fixture
def folder(scripts, tmp_path):
    """A copy of the operators' tables."""
    for file in scripts.files.PACKAGE.glob("*/configs.json"):
        (tmp_path / file.parent.name).mkdir()
        shutil.copy(file, tmp_path / file.parent.name)
    return tmp_path


def test_one_line_of_one_architecture_is_written(scripts, folder):
    before = {file: json.loads(file.read_text()) for file in folder.glob("*/configs.json")}
    changed = folder / "norm" / "configs.json"
    config = Config({"ELEMENTS": 512}, 2, 1)
    assert list(scripts.files.write(folder, 100, {("norm_forward", 1): config})) == [changed]
    before[changed]["sm_100"]["norm_forward"][1] |= {"tiles": {"ELEMENTS": 512}, "warps": 2, "stages": 1}
    assert {file: json.loads(file.read_text()) for file in folder.glob("*/configs.json")} == before


def test_without_a_gpu_tuning_is_refused(scripts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs a CUDA GPU, and there is none\. --rehearse"):
        scripts.tuner.main([])


def test_a_gpu_without_a_column_of_its_own_is_refused(scripts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    with pytest.raises(SystemExit, match="no column of its own for sm_89"):
        scripts.tuner.main([])


def test_a_line_is_held_only_while_it_is_tried(scripts):
    line = scripts.tuner.Line(90, "norm_forward", 0, [])
    before = line.config
    with line.holding(Config({"ELEMENTS": 1}, 1, 1)):
        assert launching.table()["sm_90"]["norm_forward"][0]["warps"] == 1
    assert line.config == before


def test_documents_are_made_as_kernels_want_them(scripts):
    make = scripts.tuner.Filled(torch.Generator().manual_seed(0), torch.device("cpu"))
    starts = make((1, 9000), torch.int32, "starts")
    assert (starts.shape, starts.dtype) == ((1, 9000), torch.int32)
    assert starts.unique().numel() > 2
    assert (starts <= torch.arange(9000)).all()


@pytest.mark.parametrize("kernel", ["norm_forward", "conv1d_forward"])
def test_a_rehearsal_goes_through_the_motions(folder, kernel):
    """Interpreted on the CPU, on whichever architecture that stands for."""
    command = [
        sys.executable,
        BENCH / "tune_kernels.py",
        "--rehearse",
        "--only",
        kernel,
        "--rounds",
        "1",
        "--into",
        folder,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the time") >= 3
    assert "is off by" not in done.stdout
    assert all(json.loads(file.read_text()) for file in folder.glob("*/configs.json"))
