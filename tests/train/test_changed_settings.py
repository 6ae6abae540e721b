"""What a checkpoint and a run that wants to go on from it may differ in."""

import pytest

from nemohybrid.config.run_config import RunConfig
from nemohybrid.train.state import changed_settings, fixed_settings

CORPUS = {"share": "7/10", "tokens": 200, "documents": [0, 5]}
OTHER = {"share": "3/10", "tokens": 90, "documents": [0, 2]}


@pytest.mark.parametrize(
    "then, now, lines",
    [
        ({"run.seed": 1}, {"run.seed": 1}, []),
        ({"run.seed": 1, "model.x": None}, {"run.seed": 2}, ["run.seed: 1 -> 2"]),
        ({"model.dt_limit": [0, 1]}, {"model.dt_limit": [0, 2]}, ["model.dt_limit: [0, 1] -> [0, 2]"]),
        ({"model.old": 3}, {"model.new": 4}, ["model.new: None -> 4", "model.old: 3 -> None"]),
        ({"data.corpora": [CORPUS]}, {"data.corpora": [CORPUS]}, []),
        (
            {"data.corpora": [CORPUS, OTHER]},
            {"data.corpora": [CORPUS, OTHER | {"share": "1/2", "tokens": 91}]},
            ["data.corpora[1].share: 3/10 -> 1/2", "data.corpora[1].tokens: 90 -> 91"],
        ),
        (
            {"data.corpora": [CORPUS]},
            {"data.corpora": [CORPUS | {"documents": [0, 4]}, OTHER]},
            ["data.corpora[0].documents: [0, 5] -> [0, 4]", f"data.corpora[1]: None -> {OTHER}"],
        ),
        ({"data.corpora": [CORPUS, OTHER]}, {"data.corpora": [CORPUS]}, [f"data.corpora[1]: {OTHER} -> None"]),
    ],
)
def test_every_difference_is_told_in_a_line_of_its_own(then, now, lines):
    assert changed_settings(then, now) == lines


def test_what_an_older_version_did_not_record_about_data_may_be_anything():
    assert changed_settings({"data.sequence_length": 8}, {"data.sequence_length": 8, "data.corpora": [CORPUS]}) == []


def test_an_option_that_an_older_version_did_not_have_may_stand_at_its_default():
    now = {"model.output_norm": "", "model.attention.qk_norm": False}
    assert changed_settings({}, now) == []
    assert changed_settings({}, now | {"model.output_norm": "*"}) == ["model.output_norm:  -> *"]


def test_of_the_router_only_its_balancing_may_change():
    fixed = fixed_settings(RunConfig().as_dict())
    router = {key for key in fixed if key.startswith("model.router.")}
    chooses = ("score", "expert_bias", "normalize", "scaling_factor", "groups", "top_groups", "force_balance")
    assert router == {f"model.router.{key}" for key in chooses}


def test_what_a_newer_version_recorded_may_not_be_lost():
    assert changed_settings({"data.corpora": [CORPUS]}, {}) == [f"data.corpora: {[CORPUS]} -> None"]
