"""Two ranks compute what one computes; they agree, or they fail together."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemohybrid.cli.train import train
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel import gradients
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.run import run
from nemohybrid.train.step import compute_gradients
from nemohybrid.train.trainer import Trainer

MOE = ['model.pattern="M*E"', "model.num_experts=4", "train.evaluate_every=2", "checkpoint.every=2"]


def losses(folder) -> list[float]:
    return [r["val_loss" if "val_loss" in r else "loss"] for r in read_metrics(folder / "metrics.jsonl")]


def tensors(folder, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for shard in (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if not name.startswith("random.")}  # noqa: SIM118
    return found


def assert_close(folder, reference, step: int) -> None:
    """fp32 sums in another order: losses to 1e-5 relative; Adam enlarges tiny gradients, so weights to 1e-4 absolute."""
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-5)
    got, expected = tensors(folder, step), tensors(reference, step)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_train_as_one_and_one_resumes_what_two_saved(configure, start, run_ranks, tmp_path):
    start(*MOE, f"run.dir={tmp_path}/one")
    two = configure(*MOE, f"run.dir={tmp_path}/two", "train.stop_at=2", world_size=2)
    assert run_ranks(lambda context: run(two, context)) == ["", ""]
    written = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2, 2], "only rank 0 writes"
    trainer = start(*MOE, f"run.dir={tmp_path}/two")
    assert trainer.step == 4
    assert_close(tmp_path / "two", tmp_path / "one", 4)


def test_every_gradient_of_two_ranks_equals_that_of_one(configure, run_ranks, tmp_path):
    """Microbatches of one row, the masks uneven, one expert without any token on a rank."""
    config = configure(*MOE, "train.microbatch=1")

    def grads(context: ParallelContext) -> dict[str, torch.Tensor]:
        trainer = Trainer(config, context, [])
        batch = trainer.data.batch(1)
        rows = torch.arange(batch.tokens.shape[0]) + context.data.rank * batch.tokens.shape[0]
        mask = (torch.arange(32) < (rows[:, None] + 1) * 7).float()
        loss = compute_gradients(trainer.model, replace(batch, loss_mask=mask), 1, context)
        return {"loss": loss.view(1)} | {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

    def save(context: ParallelContext) -> None:
        save_file({n: g.contiguous() for n, g in grads(context).items()}, tmp_path / f"rank{context.rank}.safetensors")

    reference = grads(ParallelContext.single())
    assert run_ranks(save) == ["", ""]
    for rank in range(2):
        with safe_open(tmp_path / f"rank{rank}.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(reference)
            for name, expected in reference.items():
                assert expected.abs().max() > 0, f"{name}: no gradient"
                got = file.get_tensor(name)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_summed_alike_in_any_bucket_size(run_ranks, monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET_ELEMENTS", 10)

    def check(context: ParallelContext) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 9, 40, 1)]
        for i, parameter in enumerate(parameters[:-1]):
            parameter.grad = torch.full_like(parameter, (context.rank + 1) * 10.0**i)
        gradients.sum_gradients(parameters, context.data)
        for i, parameter in enumerate(parameters[:-1]):
            assert torch.equal(parameter.grad, torch.full_like(parameter, 3 * 10.0**i)), f"parameter {i}"
        assert torch.equal(parameters[-1].grad, torch.zeros(1)), "no gradient anywhere counts as zero"

    assert run_ranks(check) == ["", ""]


def test_a_rank_that_fails_alone_does_not_leave_the_other_waiting(configure, run_ranks, monkeypatch):
    """The command on both ranks: one cannot go on, its peer hears of it at once and not after a collective's timeout."""
    real = Trainer.train_step

    def breaks(trainer: Trainer):
        if trainer.context.rank == 0 and trainer.step == 1:
            raise OSError("disk full")
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", breaks)
    config = configure(world_size=2)

    def command(context: ParallelContext) -> None:
        monkeypatch.setattr("nemohybrid.parallel.world.start", lambda *_: context)
        train(config)

    failures = run_ranks(command)
    assert "disk full" in failures[0]
    assert failures[1], "rank 1 went on without rank 0"
