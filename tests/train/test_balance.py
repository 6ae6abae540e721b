"""Expert load over whole steps: the bias that mends it, the numbers that tell it, on one rank and on two."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nemohybrid.errors import TrainingError
from nemohybrid.model.moe.balance import Tally
from nemohybrid.observe.metrics import read_metrics, scalars
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.step import compute_gradients
from nemohybrid.train.trainer import Trainer

EXPERTS, TOP_K, TOKENS = 4, 2, 4 * 32
MOE = [
    'model.pattern="E*E/E/E"',  # one MTP block, run twice
    f"model.num_experts={EXPERTS}",
    f"model.moe_top_k={TOP_K}",
    "model.router.bias_update_rate=0.01",
    "model.router.aux_loss_weight=0.5",
    "model.router.z_loss_weight=0.1",
    "optim.lr=1e-6",  # Adam makes much of rounding in tiny gradients, and a token near a border would change its expert
]


@pytest.fixture
def trainer(configure):
    """`trainer("train.steps=3")`: built, nothing run, no callbacks."""
    return lambda *overrides: Trainer(configure(*MOE, *overrides), ParallelContext.single(), [])


def biases(trainer: Trainer) -> list[torch.Tensor]:
    return [router.expert_bias.clone() for router in trainer.balance.routers]


def gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the first batch; most of a router's comes from its own losses, as their weights are here."""
    compute_gradients(trainer.model, trainer.data.batch(1), trainer.microbatch, trainer.context)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.balance.collect()
    return found


def test_the_bias_moves_by_the_rate_against_the_load_once_a_step(trainer):
    run = trainer()
    for step in range(1, 4):
        before = biases(run)
        run.train_step()
        for name, loads, old, new in zip(run.balance.names, run.balance.loads, before, biases(run), strict=True):
            runs = 2 if name.startswith("mtp") else 1
            assert loads.sum() == runs * TOKENS * TOP_K, f"{name}, step {step}: not every visit was counted, or twice"
            signs = [(load < loads.mean()) * 1.0 - (load > loads.mean()) * 1.0 for load in loads]
            torch.testing.assert_close(new, old + 0.01 * torch.tensor(signs), rtol=0, atol=1e-8)
    assert run.balance.names == ["layers.0", "layers.2", "mtp.0.layers.0"]
    assert all(bias.abs().max() > 0 for bias in biases(run)), "a bias never moved"


def test_microbatches_and_recomputation_change_no_bias(trainer):
    def after_two_steps(*overrides: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        run = trainer(*overrides)
        for _ in range(2):
            run.train_step()
        return biases(run), run.balance.loads

    wanted, loads = after_two_steps()
    for overrides in (
        ["train.microbatch=1"],
        ["train.recompute=layer"],
        ["train.microbatch=2", "train.recompute=layer"],
    ):
        got, got_loads = after_two_steps(*overrides)
        assert torch.equal(got_loads, loads), overrides
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours, theirs), overrides


def test_a_refused_step_moves_no_bias(trainer, monkeypatch):
    run = trainer()
    run.train_step()
    before = biases(run)
    monkeypatch.setattr("nemohybrid.train.trainer.gradient_norm", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(TrainingError):
        run.train_step()
    assert all(torch.equal(*pair) for pair in zip(before, biases(run), strict=True))


def test_an_evaluation_counts_nothing(trainer):
    run = trainer()
    run.train_step()
    before = biases(run)
    assert run.evaluate() is not None
    assert [router.losses.tally for router in run.balance.routers] == [None] * 3
    assert all(torch.equal(*pair) for pair in zip(before, biases(run), strict=True))


def test_a_resumed_run_has_bitwise_the_same_bias_and_balance(start, tmp_path):
    straight = start(*MOE, f"run.dir={tmp_path}/straight")
    start(*MOE, f"run.dir={tmp_path}/resumed", "train.stop_at=2")
    resumed = start(*MOE, f"run.dir={tmp_path}/resumed")
    assert all(torch.equal(*pair) for pair in zip(biases(straight), biases(resumed), strict=True))
    ours, theirs = (
        [r for r in read_metrics(tmp_path / f / "metrics.jsonl") if r["step"] == 4] for f in ("straight", "resumed")
    )
    keys = [key for key in ours[0] if key.startswith("moe_")]
    assert len(keys) == 8
    assert [ours[0][key] for key in keys] == [theirs[0][key] for key in keys]


def test_how_a_run_is_balanced_may_change_when_it_goes_on(start):
    start(*MOE, "train.stop_at=2")
    loose = ["model.router.bias_update_rate=0", "model.router.aux_loss=none", "model.router.z_loss_weight=0"]
    assert start(*MOE, *loose).step == 4


@pytest.mark.parametrize("kind", ["sequence", "global"])
def test_two_ranks_balance_as_one(kind, configure, run_ranks, tmp_path):
    """Gradients, then biases, loads and values of the losses over two steps.

    One microbatch a rank: what `global` has seen of a step depends on how many there are.
    """
    config = configure(*MOE, f"model.router.aux_loss={kind}")

    def found(context: ParallelContext) -> dict[str, torch.Tensor]:
        run = Trainer(config, context, [])
        result = {f"gradient of {name}": gradient for name, gradient in gradients_of(run).items()}
        steps = [run.train_step() for _ in range(2)]
        result |= {f"bias of {name}": bias for name, bias in zip(run.balance.names, biases(run), strict=True)}
        losses = [[step.metrics["moe_aux_loss"], step.metrics["moe_z_loss"]] for step in steps]
        return result | {"loads": run.balance.loads, "losses": torch.tensor(losses)}

    def save(context: ParallelContext) -> None:
        save_file({n: t.contiguous() for n, t in found(context).items()}, tmp_path / f"rank{context.rank}.safetensors")

    reference = found(ParallelContext.single())
    assert run_ranks(save) == ["", ""]
    for rank in range(2):
        with safe_open(tmp_path / f"rank{rank}.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(reference)
            for name, want in reference.items():
                same = name.startswith(
                    ("bias", "loads")
                )  # whole numbers and their signs; the others are sums in another order
                rtol, atol = (0.0, 0.0) if same else (1e-4, 1e-7)
                where = f"{name} on rank {rank}"
                torch.testing.assert_close(
                    file.get_tensor(name), want, rtol=rtol, atol=atol, msg=lambda m, w=where: f"{w}: {m}"
                )


def test_the_record_says_how_unequal_the_loads_are(trainer):
    """Loads by hand: twice the mean and a dead expert; equal; everything on one."""
    balance = trainer().balance
    for router, loads in zip(balance.routers, [[16, 0, 8, 8], [5, 5, 5, 5], [0, 0, 7, 0]], strict=True):
        router.losses.tally = Tally(*(torch.tensor(t, dtype=torch.float64) for t in (loads, loads, [3.0, 1.0, 2.0])))
    got = balance.metrics(balance.collect().tolist())
    assert got == {
        "moe_max_violation": [1.0, 0.0, 3.0],
        "moe_entropy": [0.75, 1.0, 0.0],  # (1/2 log 2 + 2/4 log 4) / log 4
        "moe_dead": [1, 0, 3],
        "moe_max_violation_worst": 3.0,
        "moe_entropy_worst": pytest.approx(0.0),
        "moe_dead_total": 4,
        "moe_aux_loss": pytest.approx(1.5),  # a sum of two runs
        "moe_z_loss": pytest.approx(0.5),
    }
    assert not any(router.losses.tally for router in balance.routers), "the tallies are not emptied"


def test_a_step_writes_one_compact_record(start, tmp_path, capsys):
    start(*MOE, "train.steps=1", "logging.console=lines")
    assert "maxvio" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert [len(record[key]) for key in ("moe_max_violation", "moe_entropy", "moe_dead")] == [3, 3, 3]
    assert record["moe_max_violation_worst"] == pytest.approx(max(record["moe_max_violation"]), abs=5e-4)
    assert record["moe_aux_loss"] == pytest.approx(1.0, abs=0.2), "1 is balanced"


def test_the_record_of_a_step_is_of_its_loads(trainer):
    run = trainer()
    metrics = run.train_step().metrics
    for row, (violation, dead) in enumerate(zip(metrics["moe_max_violation"], metrics["moe_dead"], strict=True)):
        loads = run.balance.loads[row].tolist()
        assert violation == pytest.approx(max(loads) / (sum(loads) / EXPERTS) - 1, abs=1e-3), run.balance.names[row]
        assert dead == loads.count(0), run.balance.names[row]


def test_lists_are_not_for_trackers(trainer):
    result = trainer().train_step()
    names = {name for name in scalars(result) if name.startswith("moe_")}
    assert names == {"moe_max_violation_worst", "moe_entropy_worst", "moe_dead_total", "moe_aux_loss", "moe_z_loss"}


def test_a_model_without_experts_has_no_balance(configure):
    run = Trainer(configure(), ParallelContext.single(), [])
    assert not any(key.startswith("moe_") for key in run.train_step().metrics)
    assert run.balance.names == []


def test_no_visit_and_a_single_expert_are_no_division_by_zero(trainer):
    for overrides in ([], ["model.num_experts=1", "model.moe_top_k=1", "model.router.normalize=false"]):
        numbers = trainer(*overrides).balance.collect().tolist()
        assert all(math.isfinite(number) for number in numbers), f"{overrides}: {numbers}"


def test_the_map_sums_the_loads_since_the_last_one(start, tmp_path):
    start(*MOE, "logging.expert_map_every=2", "train.steps=5")
    folder = tmp_path / "run/expert_load"
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["step_000002.json", "step_000002.png", "step_000004.json", "step_000004.png"]
    record = json.loads((folder / "step_000004.json").read_text())
    assert (record["step"], record["steps"]) == (4, 2)
    assert record["layers"] == ["layers.0", "layers.2", "mtp.0.layers.0"]
    assert [sum(row) for row in record["loads"]] == [2 * TOKENS * TOP_K] * 2 + [2 * 2 * TOKENS * TOP_K]


def test_forced_balance_is_exact_and_a_run_says_what_it_is_for(start, tmp_path, capsys):
    start(*MOE, "train.steps=1")
    assert "force_balance" not in capsys.readouterr().out
    run = start(*MOE, "model.router.force_balance=true", "train.steps=1", f"run.dir={tmp_path}/forced")
    assert "model.router.force_balance" in capsys.readouterr().out
    assert run.balance.loads.tolist() == [[64.0] * 4, [64.0] * 4, [128.0] * 4]
    assert all(bias.abs().max() == 0 for bias in biases(run)), "equal loads moved a bias"
