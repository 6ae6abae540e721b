"""TensorBoard and Weights & Biases, the latter played by a stand-in: no account, no network."""

import os
import signal
import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from nemohybrid.errors import REQUEUE
from nemohybrid.train.callbacks.wandb import mode
from nemohybrid.train.trainer import Trainer

SECRETS = {"WANDB_API_KEY": "canary-wandb-key", "HF_TOKEN": "canary-hf-token", "AWS_SECRET_ACCESS_KEY": "canary-aws"}


class FakeRun:
    """Remembers what was logged."""

    def __init__(self, settings: dict):
        self.settings, self.logged, self.metrics, self.finished = settings, [], {}, False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics[name] = step_metric

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch, tmp_path) -> list[FakeRun]:
    """Every run that a stand-in for the module `wandb` was asked to start; no key anywhere."""
    runs: list[FakeRun] = []
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)  # what find_spec looks for
    module.init = lambda **settings: runs.append(FakeRun(settings)) or runs[-1]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return runs


def test_wandb_is_offline_without_a_key_and_gets_every_step_and_evaluation(start, wandb_runs):
    start("logging.wandb=true", "train.steps=2", "train.evaluate_every=2")
    (run,) = wandb_runs
    assert run.settings["mode"] == "offline"
    assert run.metrics == {"*": "train_step"}
    assert [(v["train_step"], "loss" in v, "val_loss" in v) for v in run.logged] == [
        (1, True, False),
        (2, True, False),
        (2, False, True),
    ]
    assert {"grad_norm", "lr", "tokens_per_second", "tokens"} <= run.logged[0].keys()
    assert run.finished


def test_wandb_keeps_its_run_id_over_restarts_and_has_another_in_another_folder(start, wandb_runs, tmp_path):
    start("logging.wandb=true", "train.stop_at=2")
    start("logging.wandb=true")
    start("logging.wandb=true", f"run.dir={tmp_path}/other", "train.steps=1")
    first, again, other = (run.settings["id"] for run in wandb_runs)
    assert first == again != other
    assert wandb_runs[1].settings["resume"] == "allow"


def test_wandb_is_finished_when_the_run_fails(start, wandb_runs, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemohybrid.train.trainer.compute_gradients", fails)
    with pytest.raises(KeyboardInterrupt):
        start("logging.wandb=true")
    assert wandb_runs[0].finished


def test_wandb_is_finished_when_a_signal_stops_the_run(command, wandb_runs, monkeypatch):
    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: os.kill(os.getpid(), signal.SIGTERM) or real(self))
    assert command("logging.wandb=true") == REQUEUE
    assert [values["train_step"] for values in wandb_runs[0].logged] == [1]
    assert wandb_runs[0].finished


@pytest.mark.parametrize(
    "environment, netrc, expected",
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({"WANDB_API_KEY": ""}, "", "offline"),
        ({}, "machine api.wandb.ai login user password k", "online"),
        ({}, "machine github.com login user password k", "offline"),
        ({}, "not a netrc file", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
    ],
)
def test_wandb_goes_online_only_with_a_key_of_its_own(wandb_runs, monkeypatch, tmp_path, environment, netrc, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "home" / ".netrc").write_text(netrc)
    assert mode() == expected


def test_no_secret_of_the_environment_reaches_a_file_or_wandb(start, wandb_runs, monkeypatch, tmp_path):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    start("logging.wandb=true", "logging.tensorboard=true", "logging.picture=true", "sample.prompts=[A]")
    assert os.environ["HF_TOKEN"] == SECRETS["HF_TOKEN"]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        assert b"canary-" not in file.read_bytes(), f"a secret is in {file}"
    assert "canary-" not in str(wandb_runs[0].settings) + str(wandb_runs[0].logged)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard
def test_tensorboard_holds_the_numbers_of_the_metrics_file(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from nemohybrid.observe.metrics import read_metrics

    start("logging.tensorboard=true", "train.stop_at=2", "train.evaluate_every=2")
    start("logging.tensorboard=true", "train.evaluate_every=2")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    logged = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("loss")]
    assert logged == [(record["step"], record["loss"]) for record in records]
    assert len(events.Scalars("val_bits_per_byte")) == 2
