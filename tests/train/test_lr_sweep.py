"""`nemohybrid sweep-lr`: every arm at every rate with every seed, once; who diverged, and what grew first."""

import csv
import json
import math
import os
import signal

import pytest

from nemohybrid.__main__ import main
from nemohybrid.cli.sweep_lr import chosen_arms
from nemohybrid.config.compose import load_model_config
from nemohybrid.errors import REQUEUE, ConfigError
from nemohybrid.observe.lr_sweep import (
    divergence,
    draw,
    first_growth,
    growth_markdown,
    last_growths,
    markdown,
    outcome_of,
    smoothed,
    summarize,
    table,
    write_report,
)
from nemohybrid.train.lr_sweep import ARMS, Cell, Sweep
from nemohybrid.train.trainer import Trainer


@pytest.fixture
def sweep(corpus, tmp_path):
    """`sweep("--lrs", "1e-2") -> exit status` of a sweep of a tiny model into <tmp_path>/sweep."""
    model = ["model=tiny", "model.hidden_size=32", "model.ssm_state_size=8", 'model.pattern="M*-"']
    run = [f"data.train={corpus}/train", "data.sequence_length=16", "train.global_batch=2", "model.dtype=float32"]
    fixed = [*model, *run, "run.device=cpu", "schedule.warmup=2", "run.seed=5", "--output", str(tmp_path / "sweep")]
    return lambda *words: main(["sweep-lr", *fixed, *words])


def rows_of(folder) -> list[dict[str, str]]:
    """Of table.csv."""
    return list(csv.DictReader((folder / "table.csv").read_text().splitlines()))


def record(arm="a", lr=0.1, seed=1, losses=(5.0, 3.0), failure="", norms=None, unigram=4.0) -> dict:
    return {
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "losses": list(losses),
        "failure": failure,
        "unigram": unigram,
        "norms": norms or {},
        "seconds": 1.0,
    }


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_that_comes_along_is_legal_for_a_hybrid(arm):
    load_model_config(["model=tiny", *ARMS[arm]])


def test_a_sweep_runs_every_cell_once_and_writes_table_and_picture(sweep, tmp_path, capsys):
    words = ["--arms", "baseline", "qk_fc_norm", "--lrs", "1e-2", "3e-1", "--seeds", "1", "--steps", "3"]
    assert sweep(*words) == 0
    folder = tmp_path / "sweep"
    cells = {file.stem: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    wanted = {(arm, lr, "5") for arm in ("baseline", "qk_fc_norm") for lr in ("0.01", "0.3")}
    assert {(row["arm"], row["lr"], row["seed"]) for row in rows_of(folder)} == wanted
    assert set(cells) == {f"{arm}_lr{lr}_seed{seed}" for arm, lr, seed in wanted}
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "| baseline |" in (folder / "table.md").read_text()
    assert "| baseline |" in capsys.readouterr().out
    (folder / "table.md").unlink()
    assert sweep(*words) == 0, "the same command again"
    assert {file.stem: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()} == cells, "a cell ran again"
    assert (folder / "table.md").is_file()
    assert not (folder / "checkpoints").exists()


def test_a_cell_is_the_run_that_train_would_do(sweep, start, corpus, tmp_path):
    sweep("--lrs", "1e-2", "--seeds", "1", "--steps", "4")
    kept = json.loads((tmp_path / "sweep" / "cells" / "baseline_lr0.01_seed5.json").read_text())
    same = ["data.valid=null", "data.sequence_length=16", "train.global_batch=2", "schedule.warmup=2", "run.seed=5"]
    start(*same, 'model.pattern="M*-"', "optim.lr=1e-2", "train.steps=4")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert kept["losses"] == [pytest.approx(json.loads(line)["loss"], rel=1e-4) for line in lines]
    assert set(kept["norms"]) == {"1"}, "measured in step 1 and every ten"


def test_an_arm_of_ones_own_changes_what_it_says(sweep, tmp_path):
    sweep("--lrs", "1e-2", "--seeds", "1", "--steps", "2", "--arm", "cap", "model.attention.softcap=0.01")
    losses = {f.stem: json.loads(f.read_text())["losses"] for f in (tmp_path / "sweep" / "cells").iterdir()}
    assert losses["cap_lr0.01_seed5"] != losses["baseline_lr0.01_seed5"]


def test_records_of_other_settings_are_not_mixed_in(sweep, capsys):
    words = ["--lrs", "1e-2", "--seeds", "1", "--steps", "2"]
    assert sweep(*words) == 0
    assert sweep(*words, "optim.beta2=0.9") == 1
    assert "was made with other settings" in capsys.readouterr().err


def test_a_record_of_other_settings_is_refused_even_where_it_is_not_asked_for_again(sweep, tmp_path, capsys):
    """They would stand in one table with the new ones."""
    assert sweep("--lrs", "1e-2", "--seeds", "1", "--steps", "2", "--arm", "mine", "model.attention.softcap=5") == 0
    before = sorted(file.name for file in (tmp_path / "sweep" / "cells").iterdir())
    other = ["--lrs", "3e-2", "--seeds", "1", "--steps", "2"]
    for words in (
        [*other, "--arm", "mine", "model.attention.softcap=6"],
        [*other, "optim.beta2=0.9"],
        ["optim.beta2=0.9", *other, "--arms", "softcap"],
    ):
        assert sweep(*words) == 1, words
        assert "was made with other settings" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "sweep" / "cells").iterdir()) == before, "something ran"
    assert sweep(*other, "--arms", "softcap") == 0, "an arm and a rate more"
    assert sweep('model.pattern="M-"', *other, "--seeds", "2") == 1
    said = capsys.readouterr().err
    assert "cells was made with other settings: these do not allow an arm of it" in said
    assert "arm softcap: " in said


def test_rates_that_are_nearly_the_same_are_two_cells():
    names = [Cell("a", lr, 1).name for lr in (1e-2, 1.0, 0.1234567, 0.12345671)]
    assert names == ["a_lr0.01_seed1", "a_lr1_seed1", "a_lr0.1234567_seed1", "a_lr0.12345671_seed1"]


@pytest.mark.parametrize("name", ["a,b", "(x)", "a=b", "two words", "${oc.env:HOME}", "'q'"])
def test_any_folder_can_be_the_output(name, tmp_path):
    overrides = ["model=tiny", "data=shakespeare"]
    _, config = next(Sweep(overrides, {"baseline": ()}, [0.1], 1, 5, tmp_path / name).cells())
    assert (config.run.dir, config.data.cache) == (f"{tmp_path}/{name}", f"{tmp_path}/{name}/data")


def test_wrong_arms_are_found_and_named_before_anything_runs(sweep, tmp_path, capsys):
    words = ["--lrs", "1e-2", "--arm", "wrong", 'model.no_input_norm="*"', "--arm", "odd", "model.attention.softcap=-1"]
    assert sweep(*words, "--arm", "strange", "model.attention.softcap=-1") == 1
    said = capsys.readouterr().err
    assert "model.attention.qk_norm=true" in said
    assert "arm wrong: " in said
    assert "arm odd, strange: " in said
    assert "baseline" not in said
    assert not (tmp_path / "sweep" / "cells").exists()


@pytest.mark.parametrize(
    ("pattern", "arm"), [("*-", "m_bc_norm"), ("*-", "m_output_norm"), ("*-", "m_dt_limit"), ("M-", "softcap")]
)
def test_an_arm_that_changes_nothing_in_this_pattern_is_refused_by_name(pattern, arm, tmp_path):
    overrides = ["model=tiny", "data=shakespeare", f'model.pattern="{pattern}"']
    with pytest.raises(ConfigError, match=f"^arm {arm}: "):
        list(Sweep(overrides, {"baseline": (), arm: ARMS[arm]}, [0.1], 1, 5, tmp_path).cells())


def test_two_arms_with_the_same_settings_are_refused(sweep, tmp_path, capsys):
    """The overrides of all arms made one of the other."""
    assert sweep("model.attention.softcap=50", "--arms", "baseline", "softcap", "--lrs", "1e-2") == 1
    assert "arms baseline and softcap come to the same settings" in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "cells").exists()


def test_names_of_arms_are_checked():
    with pytest.raises(ConfigError, match="Did you mean 'baseline'"):
        chosen_arms(["baselin"], [], ARMS)
    for own in ("baseline", "../up", ""):
        with pytest.raises(ConfigError, match="a name of its own"):
            chosen_arms([], [[own, "model.attention.softcap=1"]], ARMS)


@pytest.mark.parametrize("words", [["--lrs", "0"], ["--lrs", "nan"], ["--lrs", "1", "--seeds", "0"], []])
def test_numbers_that_make_no_sweep_are_refused(sweep, words):
    with pytest.raises(SystemExit, match="2"):
        sweep(*words)


def test_a_run_whose_loss_overflows_is_a_result_and_not_an_error(sweep, tmp_path):
    """Large enough to overflow fp32 in the squared activation of the second step."""
    assert sweep("--lrs", "1e16", "--seeds", "1", "--steps", "5", "schedule.warmup=0") == 0
    (row,) = rows_of(tmp_path / "sweep")
    assert row["diverged"] == "not finite"
    assert row["final"] == "nan"


def test_a_signal_stops_a_sweep_which_then_goes_on_where_it_was(sweep, tmp_path, monkeypatch):
    words = ["--lrs", "1e-2", "--seeds", "2", "--steps", "3"]
    steps, real = [], Trainer.train_step

    def counted(self):
        steps.append(self.step)
        if len(steps) == 5:  # in the second cell
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", counted)
    cells = tmp_path / "sweep" / "cells"
    assert sweep(*words) == REQUEUE
    assert [file.name for file in cells.iterdir()] == ["baseline_lr0.01_seed5.json"]
    assert (tmp_path / "sweep" / "table.md").is_file(), "the report of what there is"
    assert sweep(*words) == 0
    assert len(list(cells.iterdir())) == 2
    assert len(steps) == 8, "the first cell was not run again"


def test_a_report_that_fails_does_not_hide_why_the_sweep_ended(sweep, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("the real one")

    def fails_too(_):
        raise ValueError("the other one")

    monkeypatch.setattr(Trainer, "train_step", fails)
    monkeypatch.setattr("nemohybrid.observe.lr_sweep.write_report", fails_too)
    with pytest.raises(RuntimeError, match="the real one") as caught:
        sweep("--lrs", "1e-2", "--steps", "2")
    assert caught.value.__context__ is None
    assert "the other one" in capsys.readouterr().err


def test_torchrun_is_refused(sweep, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep("--lrs", "1") == 1
    assert "without torchrun" in capsys.readouterr().err


def test_the_three_signs_of_divergence():
    assert divergence(math.nan, 2.0, 3.3) == "not finite"
    assert divergence(2.2, 2.0, 3.3) == "rose"
    assert divergence(3.3, 3.3, 3.3) == "learned nothing"
    assert divergence(2.05, 2.0, 3.3) == ""


def test_losses_are_smoothed_over_a_tenth_of_the_run():
    assert smoothed([4.0, 2.0, 2.0]) == [4.0, 2.0, 2.0]
    assert smoothed([float(i) for i in range(20)])[:2] == [0.5, 1.5]
    assert outcome_of(record(losses=[5.0] * 10 + [1.0] * 9 + [2.0])).final == 1.5


def test_the_output_that_first_doubles_beside_runs_that_train_is_named():
    calm = [outcome_of(record(norms={"1": {"x": [1.0, 2.0], "y": [1.0]}, "2": {"x": [2.0, 2.0], "y": [2.0]}}))] * 2
    wild = record(lr=1.0, norms={"1": {"x": [1.9, 3.9], "y": [1.0]}, "2": {"x": [4.1, 9.0], "y": [3.9]}})
    growth = first_growth(outcome_of(wild), calm)
    assert growth is not None
    assert (growth.slot, growth.layer, growth.step, growth.times) == ("x", 1, 2, 4.5)
    assert str(growth) == "x[1] at step 2, 4.5 times"
    assert last_growths(outcome_of(wild), calm) == {"x": 4.5, "y": 1.95}
    assert first_growth(outcome_of(wild), calm, "y") is None, "3.9 is less than twice 2"
    assert first_growth(calm[0], calm) is None
    assert first_growth(outcome_of(wild), []) is None, "nothing to compare with"


def test_what_grew_by_how_much_is_a_mean_over_diverged_runs():
    """Geometric: 4 and 9 times are 6 times. Without a run that trains there is nothing to compare with."""
    calm = record(norms={"1": {"x": [1.0], "y": [2.0]}})
    wild = [
        record(lr=1.0, seed=s, losses=[5.0, 6.0], norms={"1": {"x": [x], "y": [2.0]}}) for s, x in ((1, 4.0), (2, 9.0))
    ]
    lost = record("b", norms={"1": {"x": [1.0], "y": [2.0]}}, losses=[5.0, 5.0])
    summaries = summarize([outcome_of(r) for r in [calm, *wild, lost]])
    assert growth_markdown(summaries) == "| output | a |\n| --- | --- |\n| x | 6 |\n| y | 1 |\n"
    assert summaries[0].grew_first() == {"x": 2}
    assert summaries[1].grew_first() == {"nothing": 1}


def grown(runs: list[dict]):
    """The summary of one arm, of which the first run trains and the others diverge."""
    (summary,) = summarize([outcome_of(run) for run in runs])
    return summary


def test_a_dead_output_is_counted_and_does_not_spoil_the_mean_of_the_others():
    """Squared ReLU whose inputs all fell below 0. 4 and 9 times are 6 times; the third run has no logarithm."""
    calm = record(norms={"1": {"x": [1.0], "y": [2.0]}})
    wild = [
        record(lr=1.0, seed=s, losses=[5.0, 6.0], norms={"1": {"x": [x], "y": [0.0]}})
        for s, x in ((1, 4.0), (2, 0.0), (3, 9.0))
    ]
    grew = {slot: str(mean) for slot, mean in grown([calm, *wild]).grew_by().items()}
    assert grew == {"x": "6 (0 in 1)", "y": "0 (0 in 3)"}


def test_a_dead_or_overflowed_reference_measures_nothing():
    calm = outcome_of(record(norms={"1": {"dead": [0.0, 1.0], "over": [math.inf], "x": [1.0]}}))
    wild = outcome_of(record(lr=1.0, norms={"1": {"dead": [1.0, 3.0], "over": [1.0], "x": [2.5]}}))
    assert last_growths(wild, [calm]) == {"dead": 3.0, "x": 2.5}
    assert str(first_growth(wild, [calm])) == "dead[1] at step 1, 3 times"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_output_that_overflows_is_the_largest_growth(value):
    calm = outcome_of(record(norms={"1": {"x": [1.0], "y": [1.0]}}))
    wild = outcome_of(record(lr=1.0, norms={"1": {"x": [value], "y": [3.0]}}))
    assert str(first_growth(wild, [calm])) == "x[0] at step 1, inf times"
    assert last_growths(wild, [calm]) == {"x": math.inf, "y": 3.0}


def test_arms_with_other_layers_stand_in_one_table():
    runs = [
        record(arm, lr, losses=losses, norms={"1": {slot: [value]}})
        for arm, slot in (("a", "mlp.fc2"), ("b", "mamba2.out_proj"))
        for lr, losses, value in ((0.1, [5.0, 3.0], 1.0), (1.0, [5.0, 6.0], 7.0))
    ]
    _, _, *rows = growth_markdown(summarize([outcome_of(run) for run in runs])).splitlines()
    assert rows == ["| mamba2.out_proj |  | 7 |", "| mlp.fc2 | 7 |  |"]


def test_runs_that_fail_in_their_first_step_are_reported_and_drawn(tmp_path):
    """They have no loss: alone, and beside runs that have one."""
    lost = [record("lost", lr, losses=[], failure="step 1: the loss is nan") for lr in (0.1, 1.0)]
    for runs in (lost, [record(), record(seed=2, losses=[], failure="step 1"), *lost]):
        for number, run in enumerate(runs):
            (tmp_path / "cells").mkdir(exist_ok=True)
            (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(run))
        summaries = write_report(tmp_path)
        assert summaries[-1].arm == "lost"
        text = (tmp_path / "table.md").read_text()
        assert "| no loss (1/1 diverged) | no loss (1/1 diverged) | none | none | nothing 2 | nothing 2 |" in text
        assert "inf" not in text
        assert "nan" not in text
    assert "| no loss (1/2 diverged) |" in text


def test_a_run_without_a_loss_is_drawn_as_high_as_the_worst_that_has_one(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *rest, **how: drawn.append(y) or real(self, x, y, *rest, **how)
    )
    runs = [record(), record("lost", losses=[], failure="step 1")]
    draw(summarize([outcome_of(run) for run in runs]), tmp_path / "picture.png")
    assert drawn == [[3.0], [], [3.0], [3.0]], "a line and crosses of each arm"


def test_limit_and_sensitivity_of_an_arm():
    """Means over rates: 3, 2, and 5 where a loss of 9 is cut to the initial 5 (Wortsman et al. 2023)."""
    runs = [record(lr=0.01, losses=[5.0, 3.0]), record(lr=0.1, losses=[5.0, 2.0])]
    runs += [record(lr=1.0, seed=s, losses=[5.0, 1.0, 9.0]) for s in (1, 2)]
    broken = [record("b", lr, losses=[5.0], failure="step 2: the loss is nan") for lr in (0.01, 0.1)]
    first, second = summarize([outcome_of(r) for r in runs + broken])
    assert (first.arm, first.limit, first.best) == ("a", 0.1, 2.0)
    assert first.sensitivity == pytest.approx((3 + 2 + 5) / 3 - 2)
    assert (second.arm, second.limit, second.best) == ("b", 0.0, 5.0)
    head, _, row, other = markdown([first, second]).splitlines()
    assert head.startswith("| arm | 0.01 | 0.1 | 1 | stable up to |")
    assert "| 5.000 ± 0.000 (2/2 diverged) | 0.1 |" in row
    assert "| none |" in other
    assert table([first, second]).splitlines()[-1].startswith("b,0.1,1,5.0000,nan,5.0000,not finite,")


def test_one_seed_comes_after_the_other(tmp_path):
    """So that a sweep that is not finished has all arms and rates."""
    overrides = ["model=tiny", "data=shakespeare", "run.seed=3"]
    sweep = Sweep(overrides, {"baseline": (), "qk_norm": ARMS["qk_norm"]}, [0.1, 1.0], 2, 5, tmp_path)
    cells = [(cell.seed, cell.lr, cell.arm) for cell, _ in sweep.cells()]
    assert cells == [(s, lr, arm) for s in (3, 4) for lr in (0.1, 1.0) for arm in ("baseline", "qk_norm")]
    config = next(config for cell, config in sweep.cells() if cell.name == "qk_norm_lr1_seed4")
    assert (config.optim.lr, config.run.seed, config.train.steps) == (1.0, 4, 5)
    assert config.model.attention.qk_norm
