"""`metrics.jsonl` survives crashes and says everything once; the picture shows it."""

import json

import matplotlib.image
import numpy as np
import pytest

from nemohybrid.observe.metrics import MetricsWriter, read_metrics, scalars
from nemohybrid.observe.picture import draw_loss
from nemohybrid.train.step import StepResult


def test_a_record_is_on_its_way_to_the_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "deep" / "metrics.jsonl")
    writer.write({"step": 1, "loss": 0.1})
    assert (tmp_path / "deep" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1}\n'
    writer.close()


def test_a_line_cut_by_a_crash_spoils_no_other(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    writer = MetricsWriter(file)
    writer.write({"step": 2, "loss": 2.0})
    writer.close()
    assert read_metrics(file) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_of_a_replayed_step_the_last_record_counts_and_evaluations_follow_their_step(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "val_loss": 5.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "val_loss": 5.5},
        {"step": 3, "loss": 3.0},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path / "m.jsonl") == [lines[0], lines[3], lines[4], lines[5]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_know_leave_the_file_readable(tmp_path, value):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1, "loss": value})
    writer.close()
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)["loss"] == str(value)


def test_trackers_get_every_number_but_the_step_and_nothing_that_is_none():
    result = StepResult(3, 1.5, 0.5, 1e-3, 4, 128, 0.25, {"mfu": None, "tokens_per_second": 512.0})
    got = scalars(result)
    assert got == {
        "loss": 1.5,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "batch": 4.0,
        "tokens": 128.0,
        "seconds": 0.25,
        "tokens_per_second": 512.0,
    }


RECORDS = [{"step": s, "loss": 5 - s / 10, "bits_per_byte": 7 - s / 10} for s in range(1, 30)]


@pytest.mark.parametrize(
    "records",
    [
        RECORDS,
        [*RECORDS, {"step": 29, "val_loss": 3.0, "val_bits_per_byte": 4.0}],
        [{"step": 1, "loss": 2.0}],
        [
            *RECORDS,
            {"step": 30, "loss": "nan", "bits_per_byte": "nan"},
            {"step": 30, "val_loss": "nan", "val_bits_per_byte": "nan"},
        ],
    ],
    ids=["training", "with evaluation", "one step", "not a number"],
)
def test_the_loss_curve_is_a_png_with_something_on_it(tmp_path, records):
    draw_loss(records, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    colours = np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)
    assert len(colours) > 10, "an empty picture"


def test_an_evaluation_changes_the_picture(tmp_path):
    draw_loss(RECORDS, tmp_path / "a.png", "a run")
    draw_loss([*RECORDS, {"step": 15, "val_bits_per_byte": 6.0}], tmp_path / "b.png", "a run")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
