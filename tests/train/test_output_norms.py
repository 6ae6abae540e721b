"""`logging.output_norms`: how large the outputs of the projections are, whatever way the batch is cut and recomputed."""

import json
from dataclasses import asdict

import pytest
import torch

from nemohybrid.model import SequenceContext
from nemohybrid.observe.metrics import MetricsWriter, read_metrics, scalars
from nemohybrid.observe.output_norms import OutputNorms
from nemohybrid.parallel.context import Group
from nemohybrid.train.run import run
from nemohybrid.train.step import StepResult
from nemohybrid.train.trainer import Trainer

HYBRID = ['model.pattern="M*-E*"', "model.num_experts=4", "model.moe_latent_size=16"]
SLOTS = {
    **dict.fromkeys(["mamba2.in_proj.z", "mamba2.in_proj.x", "mamba2.in_proj.B", "mamba2.in_proj.C"], 1),
    **dict.fromkeys(["mamba2.in_proj.dt", "mamba2.out_proj", "mlp.fc1", "mlp.fc2"], 1),
    **dict.fromkeys(["attention.qkv.q", "attention.qkv.k", "attention.qkv.v", "attention.out_proj"], 2),
    **dict.fromkeys(
        ["moe.router.gate", "moe.latent_down", "moe.latent_up", "moe.shared_expert.fc1", "moe.shared_expert.fc2"], 1
    ),
}
"""Slot -> how many layers of the pattern have it."""


def norms_by_step(folder) -> dict[int, dict[str, list[float]]]:
    """Step -> slot -> an RMS a layer, of the steps that have any."""
    found = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        slots = {k.removeprefix("output_norm/"): v for k, v in record.items() if k.startswith("output_norm/")}
        if slots:
            found[record["step"]] = slots
    return found


def assert_same_norms(got, want) -> None:
    """Four digits are written."""
    assert got.keys() == want.keys()
    for step, slots in want.items():
        for slot, values in slots.items():
            assert got[step][slot] == pytest.approx(values, rel=2e-3), f"{slot} in step {step}"


def test_every_projection_is_measured_by_part_and_layer_in_the_steps_that_are_due(start, tmp_path):
    start(*HYBRID, "logging.output_norms=2", "train.steps=5")
    norms = norms_by_step(tmp_path / "run")
    assert list(norms) == [1, 2, 4]
    assert {slot: len(values) for slot, values in norms[2].items()} == SLOTS


def test_the_numbers_are_root_mean_squares_of_what_the_projections_return(tiny_model, token_rows):
    model, ids = tiny_model("M*-"), token_rows(2, 9)
    norms = OutputNorms(model)
    norms.attach()
    model(ids)
    seen = norms.read(Group())
    x = model.embedding.embed(ids, model.dtype, SequenceContext(2, 9))
    for layer in model.layers[:2]:
        x = layer(x, SequenceContext(2, 9))
    mlp = model.layers[2]
    want = mlp.mixer.fc1(mlp.norm(x)).double().square().mean().sqrt().item()
    assert seen["mlp.fc1"] == pytest.approx([want], rel=1e-3)
    first = model.layers[0]
    B = first.mixer.in_proj(first.norm(model.embedding.embed(ids, model.dtype, SequenceContext(2, 9))))[:, 48:58]
    assert seen["mamba2.in_proj.B"] == pytest.approx([B.double().square().mean().sqrt().item()], rel=1e-3)


@pytest.mark.parametrize("cut", ["train.microbatch=1", "train.recompute=layer"])
def test_microbatches_and_recomputation_change_no_norm(cut, start, tmp_path):
    for name, words in (("plain", []), ("cut", [cut])):
        start(*HYBRID, "logging.output_norms=1", "train.steps=2", f"run.dir={tmp_path}/{name}", *words)
    assert_same_norms(norms_by_step(tmp_path / "cut"), norms_by_step(tmp_path / "plain"))


def test_two_ranks_report_what_one_reports_with_every_norm_there_is(configure, start, run_ranks, tmp_path):
    """The second step is measured after an update: gradients of the norms are summed over ranks too."""
    words = [*HYBRID, "logging.output_norms=1", "train.steps=2", "optim.lr=1e-2"]
    words += [f"model.attention.{key}=true" for key in ("qk_norm", "v_norm")] + ["model.attention.softcap=5"]
    words += [f"model.{key}=true" for key in ("mamba_bc_norm", "mamba_x_norm")]
    words += ['model.no_input_norm="M*"', 'model.output_norm="M*-E"']
    start(*words, f"run.dir={tmp_path}/one")
    two = configure(*words, f"run.dir={tmp_path}/two", world_size=2)
    assert run_ranks(lambda context: run(two, context)) == ["", ""]
    assert_same_norms(norms_by_step(tmp_path / "two"), norms_by_step(tmp_path / "one"))


def test_hooks_hang_on_the_model_only_while_a_step_is_measured(start, monkeypatch):
    hooks, real = [], Trainer.train_step

    def counted(self):
        hooks.append(sum(len(module._forward_hooks) for module in self.model.modules()))
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", counted)
    trainer = start("logging.output_norms=3", "train.steps=4", "train.evaluate_every=3")
    assert hooks == [6, 0, 6, 0], "two projections each of M, - and *, in steps 1 and 3"
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_measuring_changes_no_loss(start, tmp_path):
    for name, every in (("off", 0), ("on", 1)):
        start(f"logging.output_norms={every}", f"run.dir={tmp_path}/{name}")
    off, on = ([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("off", "on"))
    assert off == on


def test_a_repeated_mtp_block_is_measured_over_all_its_runs(tiny_model, token_rows):
    model = tiny_model("M-/*-/*-")
    norms = OutputNorms(model)
    norms.attach()
    model.forward_mtp(token_rows(2, 9))
    assert norms._tokens[model.mtp[0].eh_proj] == 2 * 2 * 9, "two depths run the one block"
    seen = norms.read(Group())
    assert [slot for slot in seen if slot.startswith("mtp.")] == [
        "mtp.eh_proj",
        *(f"mtp.attention.{name}" for name in ("qkv.q", "qkv.k", "qkv.v", "out_proj")),
        "mtp.mlp.fc1",
        "mtp.mlp.fc2",
    ]


def test_layers_that_did_not_run_are_left_out(tiny_model, token_rows):
    model = tiny_model("M/*-")
    norms = OutputNorms(model)
    norms.attach()
    model(token_rows(1, 5))
    assert {slot.partition(".")[0] for slot in norms.read(Group())} == {"mamba2"}
    norms.attach()
    assert norms.read(Group()) == {}, "nothing ran since"


def test_trackers_get_one_number_a_slot_and_the_file_a_list(tmp_path):
    metrics = {"output_norm/mlp.fc1": [1.0, float("inf")], "output_norm_max/mlp.fc1": 3.0}
    result = StepResult(1, 1.0, 1.0, 1e-3, 4, 128, 0.1, metrics)
    assert "output_norm/mlp.fc1" not in scalars(result)
    assert scalars(result)["output_norm_max/mlp.fc1"] == 3.0
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(asdict(result)["metrics"])
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["output_norm/mlp.fc1"] == [1.0, "inf"]


def test_an_overflowing_output_is_seen_as_such(tiny_model, token_rows):
    model = tiny_model("-")
    with torch.no_grad():
        model.layers[0].mixer.fc2.weight.fill_(1e30)
    norms = OutputNorms(model)
    norms.attach()
    model(token_rows(1, 5))
    assert norms.read(Group())["mlp.fc2"] == [float("inf")]
