"""A NaN or an infinity reaches neither weights nor optimizer nor a checkpoint; all ranks stop, and its origin is named."""

from typing import Any

import pytest
import torch
from torch import Tensor

import nemohybrid.train.trainer as trainer_module
from nemohybrid.errors import CheckpointError, TrainingError
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.run import run
from nemohybrid.train.state import run_tensors
from nemohybrid.train.trainer import Trainer

BAD = {
    "forward": "the output of layers.1.mixer.fc1",
    "backward": "the gradient of layers.1.mixer.fc1.weight",
}


def spoil(trainer: Trainer, way: str, row: Tensor, value: float) -> None:
    """From the trainer's second step on, put `value` into one entry of a layer's output, or of the gradient that comes
    back to it, in the microbatch that begins with the tokens of `row`."""
    current: list[Tensor] = []
    hidden_states = trainer.model.hidden_states

    def remember(input_ids: Tensor, seq: SequenceContext | None = None, *of_a_stage: Any) -> Tensor:
        current[:] = [input_ids[0]]
        return hidden_states(input_ids, seq, *of_a_stage)

    trainer.model.hidden_states = remember

    def spoilt(tensor: Tensor) -> Tensor:
        poison = torch.zeros_like(tensor)
        poison[0, 0] = value
        return tensor + poison

    def hook(_, __, output: Tensor) -> Tensor | None:
        if trainer.step == 0 or not torch.equal(current[0], row):
            return None
        if way == "forward":
            return spoilt(output)
        if output.requires_grad:
            output.register_hook(spoilt)
        return None

    trainer.model.get_submodule("layers.1.mixer.fc1").register_forward_hook(hook)


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run_tensors(trainer.model, trainer.optimizer).items()}


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("value, recompute", [(float("nan"), "none"), (float("inf"), "layer")])
def test_a_bad_number_is_named_and_nothing_moves(configure, way, value, recompute):
    config = configure("train.microbatch=2", f"train.recompute={recompute}", "checkpoint.every=1")
    trainer = Trainer(config, ParallelContext.single(), [])
    spoil(trainer, way, trainer.data.batch(2).tokens[2], value)
    trainer.train_step()
    trainer.save()
    before = snapshot(trainer)
    with pytest.raises(TrainingError) as caught:
        trainer.train_step()
    assert f"First bad tensor: {BAD[way]} in microbatch 2 of 2 on rank 0" in str(caught.value)
    assert str(caught.value).startswith("step 2: the loss is ")
    assert "newest checkpoint: " in str(caught.value)
    assert "step_00000001" in str(caught.value)
    assert trainer.step == 1
    for name, tensor in snapshot(trainer).items():
        assert torch.equal(tensor, before[name]), f"{name} moved"


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_bad_rank_stops_both_with_the_same_words(configure, run_ranks, monkeypatch, tmp_path, way, bad_rank):
    config = configure("checkpoint.every=1", world_size=2)
    real = Trainer.fit

    def fit(trainer: Trainer, signals=None):
        if trainer.context.rank == bad_rank:
            spoil(trainer, way, trainer.data.batch(2).tokens[0], float("nan"))
        real(trainer, signals)

    monkeypatch.setattr(Trainer, "fit", fit)
    for rank, failure in enumerate(run_ranks(lambda context: run(config, context))):
        told = f"First bad tensor: {BAD[way]} in microbatch 1 of 1 on rank {bad_rank}"
        assert f"TrainingError: step 2: the {'loss is nan' if way == 'forward' else 'loss is '}" in failure, failure
        assert told in failure, f"rank {rank}: {failure}"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_the_command_ends_with_status_one_and_goes_on_from_the_last_checkpoint(command, tmp_path, monkeypatch, capfd):
    real = Trainer.fit

    def fit(trainer: Trainer, signals=None):
        spoil(trainer, "forward", trainer.data.batch(3).tokens[0], float("nan"))
        real(trainer, signals)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        assert command("checkpoint.every=1") == 1
    error = capfd.readouterr().err
    assert error.startswith("nemohybrid train: step 3: the loss is nan")
    assert "Traceback" not in error
    folder = tmp_path / "run"
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert command("checkpoint.every=1") == 0


def test_a_norm_that_overflows_though_no_gradient_does_is_told_as_such(configure, monkeypatch):
    trainer = Trainer(configure("optim.clip_grad_norm=null"), ParallelContext.single(), [])
    monkeypatch.setattr("nemohybrid.train.trainer.gradient_norm", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(TrainingError, match="none when the step is repeated: only a sum over all of them overflows"):
        trainer.train_step()
    assert trainer.step == 0


def test_weights_that_overflow_in_the_update_are_not_saved_and_are_named_in_the_next_step(
    command, tmp_path, monkeypatch, capfd
):
    """A finite gradient and a learning rate beyond all bounds."""
    assert command("train.stop_at=2") == 0
    assert command("checkpoint.every=1", "optim.lr=1e39") == 1
    error = capfd.readouterr().err
    assert "step 3: model.embedding.weight is no longer finite after the update, so nothing was saved" in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert command("optim.lr=1e39") == 1
    assert "First bad tensor: weight embedding.weight, already before the step, on rank 0" in capfd.readouterr().err


def test_what_only_one_rank_sees_stops_all_at_once(configure, run_ranks, monkeypatch):
    """Sums are the same everywhere; a device that fails after them is not."""
    config = configure(world_size=2)

    def broken(context: ParallelContext) -> None:
        real = trainer_module.gradient_norm
        bad = torch.tensor(float("nan"))
        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "gradient_norm", lambda *p: bad if context.rank == 1 else real(*p))
            run(config, context)

    for rank, failure in enumerate(run_ranks(broken)):
        assert "TrainingError: step 1: the loss is" in failure, f"rank {rank}: {failure}"


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_finite_is_never_saved(configure, tmp_path, moment):
    trainer = Trainer(configure(), ParallelContext.single(), [])
    trainer.train_step()
    state = next(iter(trainer.optimizer.state.values()))
    state[moment].view(-1)[0] = float("inf")
    with pytest.raises(CheckpointError, match=f"optimizer.{moment}.* is no longer finite"):
        trainer.save()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
