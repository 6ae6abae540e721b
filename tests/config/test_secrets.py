"""No configuration holds a secret of the environment: a run saves it, and shows it to everybody."""

import pytest

from nemohybrid.config.secrets import is_secret, secrets_looked_up

CANARY = "canary-5f1c-9e"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HF_TOKEN_WRITE",
        "wandb_api_key",
        "GITHUB_PAT",
        "DB_PASS",
        "PGPASSWORD",
        "AWS_KEYS",
        "TOKEN2",
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "TOKENIZERS_PARALLELISM", "COMPASS", "PASSAGE", "HF_TOKEN_PATH", "KEYMAP"]
)
def test_other_names_are_none(name):
    assert not is_secret(name)


def test_a_secret_is_refused_before_its_value_is_looked_up(complaint, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    message = complaint("run.name=${oc.env:WANDB_API_KEY}", "optim.lr=${oc.env:WANDB_API_KEY}", "train.stpes=1")
    for word in (
        "run.name=${oc.env:WANDB_API_KEY}",
        "optim.lr=${oc.env:",
        "takes it from the environment",
        "train.stpes",
    ):
        assert word in message
    assert CANARY not in message


@pytest.mark.parametrize(
    "value",
    [
        "a/${oc.env:HF_TOKEN,none}/b",
        "${ oc.env : 'HF_TOKEN' }",
        "${oc.decode:${oc.env:HF_TOKEN}}",
        "${oc.env:HF_${run.name}}",
    ],
)
def test_it_is_found_in_every_spelling_and_place(value):
    assert secrets_looked_up({"a": {"b": [{"c": value}]}})[0].where.startswith("a.b.c=${oc.env:HF_")


def test_other_variables_may_be_looked_up(compose, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert compose("run.dir=${oc.env:SCRATCH}/run").run.dir == "/scratch/me/run"
