"""A scheduler or a person asks a run to stop: it saves the step it is in, says so, and goes on from there."""

import os
import signal
from pathlib import Path

import pytest
import torch

from nemohybrid.errors import REQUEUE
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.checkpointing import Checkpointer
from nemohybrid.train.evaluation import score_batch
from nemohybrid.train.run import run
from nemohybrid.train.signals import SIGNALS, StopSignals
from nemohybrid.train.trainer import Trainer

LONG = ["train.steps=9", "logging.picture=true", "sample.prompts=[A]", "sample.max_new_tokens=2"]


@pytest.fixture(autouse=True)
def same_handlers_afterwards():
    """Whatever happens in a run, its handlers do not outlive it."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def during(monkeypatch, owner: type, method: str, step: int, *numbers: int) -> None:
    """Send this process signals, one after the other, in the middle of `owner.method` at a trainer's `step`."""
    real = getattr(owner, method)

    def interrupted(self, *args):
        trainer = self if isinstance(self, Trainer) else current[0]
        if trainer.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(self, *args)

    current = []
    real_init = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *args: (current.append(self), real_init(self, *args))[1])
    monkeypatch.setattr(owner, method, interrupted)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_the_running_step_is_finished_and_saved(command, tmp_path, monkeypatch, capfd, number, status):
    during(monkeypatch, Trainer, "train_step", 2, number)
    assert command(*LONG) == status
    out = capfd.readouterr().out
    folder = tmp_path / "run"
    path = f"{folder}/checkpoints/step_00000003"
    assert f"stopped by {number.name} at step 3 of 9, saved {path}; the same command goes on from there" in out
    assert saved(folder) == ["step_00000003"]
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    assert not (folder / "loss.png").exists()
    assert not (folder / "samples.txt").exists(), "there is no time for samples"


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(command, tmp_path, monkeypatch):
    assert command(f"run.dir={tmp_path}/straight") == 0
    with monkeypatch.context() as patch:
        during(patch, Trainer, "train_step", 1, signal.SIGTERM)
        assert command() == REQUEUE
    assert command() == 0
    stopped, straight = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "straight"))
    assert [(r["step"], r["loss"]) for r in stopped] == [(r["step"], r["loss"]) for r in straight]


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 3, [signal.SIGUSR1, signal.SIGTERM]], ids=["thrice", "both"])
def test_several_signals_are_one_and_a_step_is_saved_once(command, tmp_path, monkeypatch, numbers):
    saves = []
    real = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda self, step, *rest: saves.append(step) or real(self, step, *rest))
    during(monkeypatch, Trainer, "train_step", 2, *numbers)
    assert command("train.steps=9", "checkpoint.every=3", "train.evaluate_every=3") == REQUEUE
    assert saves == [3]


def scored(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl") if "val_loss" in record]


@pytest.mark.parametrize("steps", ["train.steps=4", "train.steps=2"], ids=["between", "at the end"])
def test_a_signal_while_scoring_saves_at_once_and_the_score_is_made_up_for(command, tmp_path, monkeypatch, steps):
    """Scoring may take longer than a scheduler waits."""
    seen = []

    def loss(*arguments):
        scoring = not torch.is_grad_enabled()
        if scoring:
            seen.append(saved(tmp_path / "run") if (tmp_path / "run" / "checkpoints").exists() else [])
            os.kill(os.getpid(), signal.SIGTERM)
        return score_batch(*arguments)

    overrides = [steps, "train.evaluate_every=2", "logging.picture=true"]
    with monkeypatch.context() as patch:
        patch.setattr("nemohybrid.train.evaluation.score_batch", loss)
        assert command(*overrides) == REQUEUE
    assert len(seen) == 1, "no second batch after the signal"
    assert (saved(tmp_path / "run"), scored(tmp_path / "run")) == (["step_00000002"], [])
    assert not (tmp_path / "run" / "loss.png").exists()
    assert command(*overrides) == 0
    assert scored(tmp_path / "run") == ([2, 4] if steps == "train.steps=4" else [2])
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_signal_while_saving_is_heard_in_the_next_step(command, tmp_path, monkeypatch):
    during(monkeypatch, Checkpointer, "save", 2, signal.SIGTERM)
    assert command("train.steps=9", "checkpoint.every=2") == REQUEUE
    assert saved(tmp_path / "run") == ["step_00000002", "step_00000003"]


def test_a_stopping_run_does_not_score(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, Trainer, "train_step", 2, signal.SIGTERM)
        assert command("train.steps=4", "train.evaluate_every=3") == REQUEUE
    assert (saved(tmp_path / "run"), scored(tmp_path / "run")) == (["step_00000003"], [])
    assert command("train.steps=4", "train.evaluate_every=3") == 0
    assert scored(tmp_path / "run") == [3, 4]


def test_a_signal_in_the_last_step_lets_the_run_end(command, tmp_path, monkeypatch):
    during(monkeypatch, Trainer, "train_step", 3, signal.SIGTERM)
    assert command("sample.prompts=[A]", "sample.max_new_tokens=2") == 0
    assert (tmp_path / "run" / "samples.txt").is_file()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_before_the_first_step_a_signal_ends_the_run_at_once(command, tmp_path, monkeypatch, capfd, number, status):
    def slow(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("went on building")

    monkeypatch.setattr("nemohybrid.train.trainer.RunData", slow)
    assert command() == status
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"], "there was nothing to write"
    assert f"stopped by {number.name} at once" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_a_save_at_once_and_the_older_checkpoint_stays(command, tmp_path, monkeypatch):
    assert command("train.steps=9", "train.stop_at=2") == 0
    with monkeypatch.context() as patch:
        during(patch, Trainer, "train_step", 4, signal.SIGINT)
        patch.setattr("nemohybrid.checkpoint.storage.shard_pieces", ctrl_c)
        assert command("train.steps=9") == 130
    assert saved(tmp_path / "run") == ["step_00000002"]
    assert command("train.steps=9") == 0


def ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)
    yield b"the rest of the tensor"


def test_a_signal_to_one_rank_makes_both_save_the_same_step(configure, run_ranks, tmp_path, monkeypatch):
    config = configure("train.steps=9", world_size=2)
    real = Trainer.train_step

    def interrupted(trainer: Trainer):
        if trainer.context.rank == 1 and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)

    def member(context: ParallelContext) -> None:
        with StopSignals() as signals:
            trainer = run(config, context, signals)
        assert (trainer.step, trainer.stopped_by) == (3, signal.SIGUSR1), f"rank {context.rank}"

    assert run_ranks(member) == ["", ""]
    assert saved(tmp_path / "run") == ["step_00000003"]
