"""Runs in low precision: what they say, what their random bits depend on, and that stopping changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nemohybrid.__main__ import main
from nemohybrid.errors import ConfigError
from nemohybrid.generate.load import load_for_inference
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.precision import backends
from nemohybrid.precision.gemm import plain_gemm
from nemohybrid.precision.slot import Slot
from nemohybrid.train import precision as train_precision
from nemohybrid.train.precision import Resolved
from nemohybrid.train.trainer import Trainer

WIDE = ["model.mamba_num_heads=16", "model.mamba_head_dim=16"]  # an in_proj of 656 outputs, and not of 648
TWO = ["train.microbatch=2"]


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Product, operand and place of everything that is rounded at random."""
    drawn = []
    draw = Slot.random

    def spied(slot, x, operand, what, place):
        if operand.stochastic:
            drawn.append((slot.name, what, place))
        return draw(slot, x, operand, what, place)

    monkeypatch.setattr(Slot, "random", spied)
    return drawn


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    opened = [safe_open(file, framework="pt") for file in files]
    return {name: file.get_tensor(name) for file in opened for name in file.keys()}  # noqa: SIM118


def test_a_run_in_nvfp4_says_what_multiplies_how_and_saves_it(tmp_path, capsys):
    words = ["experiment=tiny", "precision=nvfp4", 'precision.rules=[{layers: "last 15%", recipe: bf16}]', *WIDE]
    assert main(["train", *words, "train.steps=3", f"run.dir={tmp_path}/run", "run.device=cpu"]) == 0
    said = capsys.readouterr().out
    lines = said[said.index("precision\n") :].splitlines()
    assert lines[1:6] == [
        "  M  0-2 (2)  in_proj, out_proj  nvfp4",
        "     5        in_proj, out_proj  bf16",
        "  -  1-4 (2)  fc1, fc2           nvfp4",
        "     6        fc1, fc2           bf16",
        "  *  3        qkv, o_proj        nvfp4",
    ]
    assert lines[6].startswith("nvfp4: emulated (auto")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    saved = json.loads((tmp_path / "run" / "precision.json").read_text())
    assert saved["products"]["layers.6.mixer.fc1"] == {"recipe": "bf16", "rule": 0}
    assert saved["products"]["layers.0.mixer.in_proj"] == {"recipe": "nvfp4", "rule": None}
    assert saved["backends"]["nvfp4"]["backend"] == "emulated"


def test_a_run_in_bf16_has_no_table_and_a_file(start, capsys, tmp_path):
    start("train.steps=1")
    assert "precision" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "precision.json").read_text())["recipes"] == {"bf16": {}}


def test_random_bits_are_those_of_a_step_and_a_microbatch(recorded, start):
    """Every stochastic operand once in each; a layer that is computed again draws nothing else."""
    start("precision=nvfp4", *WIDE, *TWO, "train.steps=2", "train.recompute=layer")
    operands = {(name, what) for name, what, _ in recorded}
    assert {what for _, what in operands} == {"dgrad.dy", "wgrad.dy"}
    assert len(operands) == 2 * 6, "of in_proj, out_proj, fc1, fc2, qkv and out_proj"
    assert sorted(recorded) == sorted(
        (name, what, (step, microbatch, 0)) for name, what in operands for step in (1, 2) for microbatch in (0, 1)
    )


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8_delayed"])
def test_a_run_that_stops_or_computes_layers_again_is_the_same_run(recipe, command, tmp_path):
    """Bit for bit, though gradients are rounded at random, or scaled by what was seen before."""
    words = [f"precision={recipe}", *WIDE, *TWO]
    folders = [tmp_path / name for name in ("straight", "stopped", "again")]
    assert command(*words, f"run.dir={folders[0]}") == 0
    assert command(*words, f"run.dir={folders[1]}", "train.stop_at=2") == 0
    assert command(*words, f"run.dir={folders[1]}") == 0
    assert command(*words, f"run.dir={folders[2]}", "train.recompute=layer") == 0
    straight, stopped, again = (weights(folder, 4) for folder in folders)
    assert straight.keys() == stopped.keys() == again.keys()
    for other, why in ((stopped, "after a stop"), (again, "when layers are computed again")):
        differing = [name for name in straight if not torch.equal(straight[name], other[name])]
        assert not differing, f"{differing} {why}"


def test_evaluation_changes_no_scale(configure):
    """It sees other tokens, larger ones say, which the steps of a run that is not scored do not see."""
    words = ["precision=fp8_delayed", *WIDE]
    trainers = [Trainer(configure(*words), ParallelContext.single(), []) for _ in range(2)]
    for trainer, is_scored in zip(trainers, (True, False), strict=True):
        for _ in range(2):
            trainer.train_step()
            if is_scored:
                trainer.evaluate()
    trained, scored = (trainer.precision.tensors() for trainer in trainers)
    assert any(history[-2:].count_nonzero() == 6 for name, history in trained.items() if name.endswith("history"))
    for name, tensor in trained.items():
        assert torch.equal(tensor, scored[name]), name


def test_delayed_scaling_of_the_forward_pass_alone(configure):
    """What is not quantized has a scale that nobody asks for."""
    late = "[{role: [fc1, fc2], recipe: fp8_delayed}]"
    words = ["precision=bf16", "precision.late.tokens=0", f"precision.late.rules={late}"]
    trainer = Trainer(configure(*words, "precision.late.forward_only=true"), ParallelContext.single(), [])
    trainer.train_step()
    assert trainer.model.get_submodule("layers.1.mixer.fc1").gemm.recipe.name == "fp8_delayed_forward_bf16"


def test_another_seed_rounds_otherwise(start, tmp_path):
    """Same weights and data: only the random bits of gradients are of another seed."""
    words = ["precision=nvfp4", *WIDE, "train.steps=1"]
    first = start(*words, f"run.dir={tmp_path}/a")
    other = Trainer(first.config, ParallelContext.single(), [])
    other.model.clock.seed += 1
    other.train_step()
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (first, other))
    assert not torch.equal(ours["layers.0.mixer.in_proj.weight"], theirs["layers.0.mixer.in_proj.weight"])


def test_recipes_of_later_come_with_their_token_also_after_a_stop(configure, command, tmp_path):
    """Steps of 4 x 32 tokens: those that begin at 256 or more are the third and the fourth."""
    late = ["precision=nvfp4", *WIDE, "precision.late.tokens=256", "precision.late.forward_only=true"]
    trainer = Trainer(configure(*late), ParallelContext.single(), [])
    product = trainer.model.get_submodule("layers.0.mixer.in_proj")
    seen = []
    for _ in range(4):
        trainer.train_step()
        seen.append(product.gemm.recipe.name)
    assert seen == ["nvfp4", "nvfp4", "bf16_forward_nvfp4", "bf16_forward_nvfp4"]

    assert command(*late, "train.stop_at=3") == 0
    resumed = Trainer(configure(*late), ParallelContext.single(), [])
    resumed.resume()
    assert resumed.step == 3
    assert resumed.model.get_submodule("layers.0.mixer.in_proj").gemm.recipe.name == "bf16_forward_nvfp4"
    resumed.train_step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_later_in_bf16_means_plain_products(configure):
    trainer = Trainer(configure("precision=nvfp4", *WIDE, "precision.late.tokens=128"), ParallelContext.single(), [])
    trainer.train_step()
    assert trainer.model.get_submodule("layers.0.mixer.in_proj").gemm is not plain_gemm
    trainer.train_step()
    assert {site.module.gemm for site in trainer.precision.sites} == {plain_gemm}


def test_weights_are_quantized_once_a_step_and_anew_after_it(configure):
    trainer = Trainer(
        configure("precision=mxfp8", *TWO, "model.mamba_num_heads=32", "model.mamba_head_dim=8"),
        ParallelContext.single(),
        [],
    )
    before = trainer.model.clock.weights
    trainer.train_step()
    assert trainer.model.clock.weights == before + 1
    product = trainer.model.get_submodule("layers.0.mixer.in_proj")
    kept = dict(product.gemm._weights)
    assert kept, "its weight stays whole"
    trainer.train_step()
    now = product.gemm._weights
    assert now.keys() == kept.keys()
    assert not any(torch.equal(now[key].matrix, kept[key].matrix) for key in kept)


def test_a_backend_that_cannot_is_refused_before_the_first_step(command, capsys):
    assert command("precision=nvfp4", *WIDE, "precision.backend=torch_native") == 1
    assert "nvfp4" in capsys.readouterr().err


def test_a_rule_about_a_symbol_that_is_not_ours_is_judged_by_the_built_model(configure, tmp_path):
    """Rules of the configuration know only the products of our own symbols."""
    config = configure()
    object.__setattr__(config.precision, "rules", ({"name": "layers.*.mixer.none", "recipe": "bf16"},))
    with pytest.raises(ConfigError, match=r"rule 0 of precision fits nothing: no product is named"):
        Resolved(config, torch.device("cpu"))


def test_experts_whose_recipe_comes_later_never_have_a_backend_without_one(configure):
    """Plain autograd takes no products; a run would have ended in its second step."""
    late = ["precision.late.tokens=128", "precision.late.rules=[{role: expert, recipe: fp8_current}]"]
    words = ["model=tiny_moe", 'model.pattern="*E"', *late]
    with pytest.raises(ConfigError, match=r"moe_backend=torch: .*'grouped' where experts have a recipe"):
        Trainer(configure(*words, "kernels.moe_backend=torch"), ParallelContext.single(), [])
    trainer = Trainer(configure(*words, "kernels.moe_backend=grouped"), ParallelContext.single(), [])
    experts = trainer.model.get_submodule("layers.1.mixer.experts")
    seen = []
    for _ in range(2):
        trainer.train_step()
        seen.append(experts.products is not None)
    assert seen == [False, True]
    bare = configure("model=tiny_moe", 'model.pattern="*E"', "kernels.moe_backend=torch")
    Trainer(bare, ParallelContext.single(), []).train_step()


def test_what_nobody_could_see_is_not_looked_at_in_silence(configure, monkeypatch):
    """On a GPU where `auto` takes Transformer Engine."""
    engine = backends.BACKENDS["transformer_engine"]
    monkeypatch.setattr(train_precision, "choose", lambda recipe, *_, **__: backends.Choice(recipe, engine, "auto"))
    words = ["precision=fp8_current", *WIDE]
    Resolved(configure(*words), torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"transformer_engine quantizes, which .*=auto takes here for fp8_current\. Legal"
    ):
        Resolved(configure(*words, "logging.precision_every=2"), torch.device("cpu"))


@pytest.mark.parametrize("first, then", [("bf16", "fp8_delayed"), ("fp8_delayed", "bf16"), ("fp8_delayed", "nvfp4")])
def test_a_run_may_go_on_in_another_precision(first, then, command, tmp_path):
    assert command(f"precision={first}", *WIDE, "train.stop_at=2") == 0
    assert command(f"precision={then}", *WIDE, "train.steps=3") == 0
    saved = weights(tmp_path / "run", 3)
    assert any(name.startswith("precision.") for name in saved) == (then == "fp8_delayed")


def test_weights_of_a_run_with_delayed_scaling_are_those_of_any_model(command, tmp_path):
    """They are generated with, and a new run starts from them."""
    assert command("precision=fp8_delayed", *WIDE, "train.steps=1") == 0
    model, _ = load_for_inference(tmp_path / "run", "cpu")
    saved = weights(tmp_path / "run", 1)
    assert torch.equal(model.get_parameter("final_norm.weight"), saved["model.final_norm.weight"])
    assert command(*WIDE, "train.steps=1", f"init_from={tmp_path}/run", f"run.dir={tmp_path}/new") == 0
