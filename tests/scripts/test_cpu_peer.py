"""scripts/bench/cpu_peer.py: its arithmetic and its verdict.

What needs transformers and time, the comparison itself, is not run here.
"""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[2] / "scripts/bench"
MIB = 2**20


@pytest.fixture(scope="module")
def scripts():
    """The script and its sides, as `python scripts/bench/cpu_peer.py` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield SimpleNamespace(peer=importlib.import_module("cpu_peer"), sides=importlib.import_module("cpu_peer_sides"))


@pytest.fixture
def peer(scripts) -> ModuleType:
    return scripts.peer


@pytest.fixture
def sides(scripts) -> ModuleType:
    return scripts.sides


@pytest.fixture
def pair(peer):
    """Two results that meet all conditions, with a ratio of 1.5, 1.4 and 2.0 in their three turns."""
    theirs = peer.Result(
        parameters=100,
        tokens_per_second=[1000.0, 1000.0, 500.0],
        losses=[6.9, 5.0],
        first_gradient_norm=2.0,
        peak=900 * MIB,
        baseline=300 * MIB,
    )
    ours = replace(theirs, tokens_per_second=[1500.0, 1400.0, 1000.0], peak=800 * MIB, baseline=250 * MIB)
    return ours, theirs


def test_a_turn_times_every_step_and_keeps_every_loss(sides, monkeypatch):
    losses = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(sides, "_side", SimpleNamespace(step=lambda: (next(losses), 0.5)))
    turn = sides.take_turn(3)
    assert turn.losses == [3.0, 2.0, 1.0]
    assert turn.gradient_norms == [0.5, 0.5, 0.5]
    assert len(turn.seconds) == 3
    assert min(turn.seconds) >= 0


def test_tokens_per_second_are_those_of_whole_turns_without_the_warmup(peer, sides):
    warm = sides.Turn([100.0], 0.0, [7.0], [2.5])
    turns = [sides.Turn([1.0, 3.0], 0.0, [6.0, 5.0], [1.0, 1.0]), sides.Turn([1.0, 1.0], 0.0, [4.0, 3.0], [1.0, 1.0])]
    result = peer.summarize(2048, sides.Opened(100, 10), warm, turns, peak=30)
    assert result.tokens_per_second == [1024.0, 2048.0], "2 steps of 2048 tokens in 4 and in 2 seconds"
    assert result.losses == [7.0, 6.0, 5.0, 4.0, 3.0]
    assert (result.first_gradient_norm, result.above_baseline) == (2.5, 20)


def test_ratios_compare_neighbouring_turns(peer, pair):
    assert peer.ratios(*pair) == [1.5, 1.4, 2.0]


def test_results_that_meet_all_conditions_pass(peer, pair):
    assert peer.failures(*pair, peer.PLAIN_SPEED) == []


def test_more_is_asked_of_the_kernels_in_cpp(peer, pair):
    assert peer.failures(*pair, peer.SPEED) == ["FAILED: 1.50 times as fast, less than 1.6"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tokens_per_second": [1390.0, 1390.0, 1000.0]}, "1.39 times as fast, less than 1.4"),
        ({"peak": 901 * MIB}, "peak memory 901 against 900 MiB"),
        ({"baseline": 100 * MIB}, "memory above the baseline 700 against 600 MiB"),
        ({"parameters": 101}, "101 parameters against 100"),
        ({"losses": [6.92, 5.0]}, "first losses differ by 0.0200 nats"),
        ({"losses": [6.9, 6.9]}, "a loss did not fall"),
        ({"losses": [6.9, float("nan")]}, "a loss did not fall"),
        ({"first_gradient_norm": 2.1}, "first gradient norms differ by 5.00%"),
        ({"first_gradient_norm": float("nan")}, "first gradient norms differ"),
    ],
)
def test_a_condition_that_does_not_hold_is_named(peer, pair, change, complaint):
    ours, theirs = pair
    found = peer.failures(replace(ours, **change), theirs, peer.PLAIN_SPEED)
    assert any(complaint in fault for fault in found), f"{change} gave {found}"


@pytest.fixture
def report(pair):
    """What `compare` and `main` gather."""
    ours, theirs = pair
    return {
        "machine": {"machine": "some cores"},
        "busy_before": 0.0,
        "settings": {
            "pattern": "M*-",
            "hidden_size": 8,
            "vocabulary": 9,
            "batch": 8,
            "sequence_length": 256,
            "steps": 6,
        },
        "kernels": {"built": False, "words": "not wanted"},
        "tuning": [{"chunk_size": 32, "attention": "sdpa", "seconds": 0.3}],
        "chosen": {"chunk_size": 32, "attention": "sdpa"},
        "busy_during": 0.0,
        "nemohybrid": ours,
        "transformers": theirs,
    }


def test_the_table_shows_speed_memory_and_spread(peer, report):
    text = peer.table(report)
    for line in (
        f"{'tokens/s, median':36}{'1,400':>14}{'1,000':>14}",
        f"{'peak memory, MiB':36}{'800':>14}{'900':>14}",
        f"{'  above them, MiB':36}{'550':>14}{'600':>14}",
        "speed ratio over 3 pairs of turns of 6 steps: median 1.500, min 1.400, max 2.000",
    ):
        assert line in text.splitlines(), f"{line!r} is missing in\n{text}"
    assert "WARNING" not in text


@pytest.mark.parametrize("when", ["busy_before", "busy_during"])
def test_a_busy_machine_is_warned_of(peer, report, when):
    assert "WARNING: other programs used the cores" in peer.table(report | {when: 0.3})


@pytest.fixture
def slow_run(peer, report, monkeypatch):
    """What `main` gets instead of a comparison."""
    report["nemohybrid"] = replace(report["nemohybrid"], tokens_per_second=[1000.0, 1000.0, 500.0])
    monkeypatch.setattr(peer, "compare", lambda folder, options: report)
    monkeypatch.setattr(peer, "machine", lambda threads: {"machine": "some cores"})
    monkeypatch.setattr(peer.psutil, "cpu_percent", lambda interval: 0.0)
    for variable in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(variable, "1")  # so that what main sets is undone


@pytest.mark.parametrize(("words", "status"), [([], 1), (["--no-check"], 0)], ids=["check", "no check"])
def test_a_slow_run_fails_unless_told_not_to_and_leaves_its_figures(peer, slow_run, tmp_path, words, status):
    assert peer.main([*words, "--json", str(tmp_path / "out.json")]) == status
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["transformers"]["tokens_per_second"] == [1000.0, 1000.0, 500.0]


def test_the_page_gets_what_was_printed(peer, slow_run, monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(peer, "keep", lambda report, printed: kept.append(printed))
    assert peer.main(["--page"]) == 1
    assert capsys.readouterr().out == kept[0] + "\n"
    assert "FAILED: 1.00 times as fast" in kept[0]


def test_a_run_is_put_into_the_page_with_its_figures_and_what_it_printed(peer, report, monkeypatch, tmp_path):
    page = importlib.import_module("cpu_peer_page")
    before = (page.BENCHMARKS / "cpu_peer.md").read_text().splitlines()
    (tmp_path / "cpu_peer.md").write_text("\n".join(before) + "\n")
    page.keep(report, "what was printed", tmp_path)
    after = (tmp_path / "cpu_peer.md").read_text().splitlines()
    (changed,) = (line for line, old in zip(after, before, strict=True) if line != old)
    assert changed.startswith("| without C++ kernels, [the one kept here](cpu_peer.txt)")
    assert changed.endswith("| 1.50 (1.40, 2.00) | 3 x 6 steps | 0 percent | 800, 900 | 550, 600 |")
    assert json.loads((tmp_path / "cpu_peer.json").read_text())["nemohybrid"]["parameters"] == 100
    assert (tmp_path / "cpu_peer.txt").read_text() == "what was printed\n"


def test_the_page_and_what_was_printed_are_those_of_the_figures_that_are_kept(peer):
    page = importlib.import_module("cpu_peer_page")
    kept = json.loads((page.BENCHMARKS / "cpu_peer.json").read_text())
    assert page.row(kept) in (page.BENCHMARKS / "cpu_peer.md").read_text().splitlines()
    results = {side: peer.Result(**kept[side]) for side in ("nemohybrid", "transformers")}
    assert (page.BENCHMARKS / "cpu_peer.txt").read_text().startswith(peer.table(kept | results))


@pytest.mark.parametrize("words", [["--turns", "0"], ["--steps", "-1"], ["--threads", "two"]], ids=" ".join)
def test_counts_that_make_no_sense_are_refused(peer, words):
    with pytest.raises(SystemExit) as refusal:
        peer.parse(words)
    assert refusal.value.code == 2


def test_memory_that_was_given_back_counts_at_its_highest_only(sides):
    before = sides.memory("VmRSS")
    block = torch.ones(64 * MIB // 4)
    peak = before + block.numel() * 3  # three of its four bytes a number: other memory may be given back meanwhile
    del block
    assert sides.memory("VmHWM") >= peak, "the peak forgot a block that is gone"
    assert sides.memory("VmRSS") < peak, "what is resident now counts a block that is gone"
