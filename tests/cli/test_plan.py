"""`nemohybrid plan pipeline`: what it prints and draws, and what it refuses."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

TINY = ["plan", "pipeline", "model=tiny", "data.sequence_length=32", "parallel.pipeline=2"]


def rows(out: str) -> list[list[str]]:
    """The lines of the table."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["rank"]) + 2
    return [line.split() for line in lines[start:] if line[:4].strip().isdecimal()]


def test_it_prints_the_strip_and_a_table_and_draws_the_step(nemohybrid):
    code, out, err = nemohybrid(*TINY, "--out", "pictures/step.svg", "--microbatches", "6")
    assert (code, err) == (0, "")
    assert out.startswith("stage 0 | M")
    assert "1f1b, 6 microbatches: ranks wait" in out
    table = rows(out)
    assert [row[0] for row in table] == ["0", "1"]
    assert sum(int(row[1]) for row in table) == 7
    assert all(float(number) >= 0 for row in table for number in row[2:])
    assert "wrote pictures/step.svg" in out
    assert ElementTree.parse("pictures/step.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("words", [["parallel.pipeline=4", "parallel.virtual_pipeline=2"], ["parallel.pipeline=16"]])
def test_a_published_model_of_any_size_is_planned_on_a_laptop(nemohybrid, words):
    code, out, _ = nemohybrid("plan", "pipeline", "experiment=nemotron3_super", *words, "parallel.tensor=2")
    assert code == 0
    assert len(rows(out)) == int(words[0].split("=")[1])
    assert "head and 2 MTP" in out


def test_options_may_stand_before_overrides(nemohybrid):
    code, out, _ = nemohybrid("plan", "pipeline", "--out", "a.svg", *TINY[2:])
    assert code == 0
    assert Path("a.svg").is_file()
    assert "stage 1 |" in out


def test_as_many_microbatches_are_shown_as_a_step_has_but_no_more_than_a_picture_needs(nemohybrid):
    words = ["train.microbatch=1", "parallel.data=2"]
    for batch, shown in ((8, "4 microbatches"), (4096, "8 microbatches")):
        _, out, _ = nemohybrid(*TINY, *words, f"train.global_batch={batch}")
        assert shown in out


def test_measured_times_are_written_and_read(nemohybrid):
    code, out, _ = nemohybrid(*TINY, "--measure", "--out", "here.svg")
    assert code == 0
    assert "wrote here.json" in out
    assert {"M", "*", "-", "embedding", "head"} <= json.loads(Path("here.json").read_text()).keys()
    code, again, _ = nemohybrid(*TINY, "--measured", "here.json", "--out", "here.svg")
    assert code == 0
    assert rows(again) == rows(out)


def test_a_cut_that_no_run_makes_is_given_as_a_pattern(nemohybrid):
    times = {part: [1e-3, 1e-3] for part in ("M", "-", "embedding", "head")} | {"*": [1.0, 1.0]}
    Path("times.json").write_text(json.dumps(times))
    words = [*TINY, 'model.pattern="M-M-**"', "--measured", "times.json"]
    code, out, _ = nemohybrid(*words)
    assert code == 0
    assert "to train with these cuts: 'model.pattern=\"M-M-*|*\"'" in out
    _, out, _ = nemohybrid(*TINY)
    assert "to train" not in out


def test_another_device_takes_other_times(nemohybrid):
    tables = []
    for device in ("H100", "A100"):
        code, out, _ = nemohybrid(
            "plan", "pipeline", "experiment=nemotron3_super", "parallel.pipeline=2", "--device", device
        )
        assert code == 0
        tables.append([float(row[2]) for row in rows(out)])
    assert all(slow > 1.5 * fast for fast, slow in zip(*tables, strict=True))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["parallel.pipeline=9"], "Legal numbers of stages: 1 to 7"),
        (["--device", "H101"], "unknown device 'H101'"),
        (["--measured", "absent.json"], "absent.json: cannot be read"),
        (["parallel.pipelines=2"], "parallel.pipelines"),
        (["parallel.virtual_pipeline=2", "--microbatches", "5"], "Nearest legal: 4, 6"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(nemohybrid, words, complaint):
    code, out, err = nemohybrid(*TINY, *words)
    assert code == 1
    assert complaint in err
    assert "stage 0" not in out


@pytest.mark.parametrize(
    "words", [["--colour"], ["--microbatches", "0"], ["--measure", "--measured", "x.json"]], ids=str
)
def test_an_option_that_is_none_is_a_matter_of_usage(nemohybrid, words):
    code, _, err = nemohybrid(*TINY, *words)
    assert code == 2
    assert "usage" in err
