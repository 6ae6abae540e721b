"""A run that stops and goes on is the run that never stopped, bit for bit."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nemohybrid.errors import CheckpointError, TrainingError
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train import step as step_module
from nemohybrid.train.run import run
from nemohybrid.train.trainer import Trainer

TWENTY = ["train.steps=20", "checkpoint.every=5", "schedule.warmup=3", "schedule.decay=8", "train.evaluate_every=10"]


def learning(folder: Path) -> list[tuple]:
    """What a run computed, step by step: everything in `metrics.jsonl` that does not depend on the clock."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "val_loss", "val_bits_per_byte")
    return [tuple(record.get(key) for key in keys) for record in read_metrics(folder / "metrics.jsonl")]


def saved(folder: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes: parameters, moments, random states."""
    found = {}
    for shard in sorted((folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found |= {
                name: file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
                for name in file.keys()  # noqa: SIM118
            }
    assert {name.partition(".")[0] for name in found} == {"model", "optimizer", "random"}, (
        "a part of the run is missing"
    )
    return found


def assert_same_run(folder: Path, reference: Path) -> None:
    assert learning(folder) == learning(reference), "the metrics of some step differ"
    got, expected = saved(folder, 20), saved(reference, 20)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name] != expected[name]] == [], "these tensors differ"


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Where the uninterrupted run of 20 steps goes; the first test that needs it trains it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def reference(straight, configure) -> Path:
    if not straight.exists():
        run(configure(*TWENTY, f"run.dir={straight}"), ParallelContext.single())
    return straight


def test_ten_steps_a_kill_and_ten_more_equal_twenty(reference, configure, run_child, tmp_path, capfd):
    class Killed(Trainer):
        def train_step(self):
            if self.step == 13:  # three steps past the checkpoint, their metrics written
                os.kill(os.getpid(), signal.SIGKILL)
            return super().train_step()

    def doomed():
        run.__globals__["Trainer"] = Killed
        run(configure(*TWENTY, "checkpoint.every=10"), ParallelContext.single())

    assert run_child(doomed) == -signal.SIGKILL
    folder = tmp_path / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000010"]
    assert len(learning(folder)) == 14, "13 steps and one evaluation were done before the kill"
    run(configure(*TWENTY, "checkpoint.every=10"), ParallelContext.single())
    assert "resuming from" in capfd.readouterr().out
    lines = (folder / "metrics.jsonl").read_text().count('"loss"')
    assert lines == 13 + 10, "replayed steps are written again"
    assert_same_run(folder, reference)


def test_stopping_at_ten_leaves_the_schedule_and_resumes_to_the_same_run(reference, start, tmp_path):
    first = start(*TWENTY, "train.stop_at=10", "checkpoint.every=0")
    assert first.step == 10
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").is_dir(), "stop_at ends with a checkpoint"
    start(*TWENTY)
    assert_same_run(tmp_path / "run", reference)


def test_a_finished_run_has_nothing_more_to_do(reference, start, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    before = learning(tmp_path / "run"), saved(tmp_path / "run", 20)
    assert start(*TWENTY).step == 20
    assert (learning(tmp_path / "run"), saved(tmp_path / "run", 20)) == before


def test_the_newest_checkpoints_stay(reference):
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == ["step_00000015", "step_00000020"]


def damage(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(reference, start, tmp_path, capsys):
    shutil.copytree(reference, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step_00000020")
    start(*TWENTY)
    told = capsys.readouterr().out
    assert "damaged checkpoint" in told
    assert "step_00000020" in told
    assert "step 15 of 20" in told
    assert_same_run(tmp_path / "run", reference)


def test_with_all_checkpoints_damaged_no_run_starts_from_step_zero(reference, start, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        damage(checkpoint)
    with pytest.raises(CheckpointError, match="step_00000020"):
        start(*TWENTY)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_never_refuses_a_folder_with_checkpoints(reference, start, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    with pytest.raises(CheckpointError, match="resume=never"):
        start(*TWENTY, "resume=never")


def test_a_changed_fixed_setting_is_refused_with_both_values_and_changes_nothing(reference, start, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(CheckpointError) as caught:
        start(*TWENTY, "run.seed=7", "model.init_std=0.03", "train.batch_ramp.start=2", "train.global_batch=8")
    for line in ("run.seed: 1234 -> 7", "model.init_std: 0.02 -> 0.03", "train.batch_ramp.start: None -> 2"):
        assert line in str(caught.value)
    assert "train.global_batch: 4 -> 8" in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == before, "a refused resume rewrote the configuration"


def test_another_tokenizer_of_the_same_size_is_refused(reference, configure, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path / "run")
    trainer = Trainer(configure(*TWENTY), ParallelContext.single(), [])
    other = {**trainer.data.tokenizer.description, "type": "other"}
    monkeypatch.setattr(type(trainer.data.tokenizer), "description", property(lambda self: other))
    with pytest.raises(CheckpointError, match="tokenizer: byte with 257 ids -> other with 257 ids"):
        trainer.resume()


def test_settings_that_do_not_change_the_mathematics_may_change(reference, start, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step_00000020")
    start(*TWENTY, "train.microbatch=2", "model.name=renamed", "model.chunk_size=8", "logging.every=3")


def test_a_named_checkpoint_starts_a_run_in_another_folder(reference, start, tmp_path):
    trainer = start(*TWENTY, f"resume={reference}/checkpoints/step_00000015")
    assert trainer.step == 20
    assert saved(tmp_path / "run", 20) == saved(reference, 20)


def test_going_back_below_newer_checkpoints_is_refused(reference, start, tmp_path):
    """They would count as the newest ones, and what is saved next would be pruned at once."""
    shutil.copytree(reference, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match="newer checkpoints: step_00000020"):
        start(*TWENTY, f"resume={checkpoints}/step_00000015")


def test_a_gradient_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(start, tmp_path, monkeypatch):
    real = step_module.summed_losses

    def poisoned(model, *arguments, **options):
        loss = real(model, *arguments, **options)
        return loss * float("nan") if model.steps_seen == 3 else loss

    def counted(trainer):
        trainer.model.steps_seen = trainer.step + 1
        return original(trainer)

    original = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", counted)
    monkeypatch.setattr(step_module, "summed_losses", poisoned)
    with pytest.raises(TrainingError, match="step 3"):
        start("checkpoint.every=1")
    folder = tmp_path / "run"
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
