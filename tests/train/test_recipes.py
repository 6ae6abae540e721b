"""The small twins of the published runs train, with the rates and the weight decay of the papers."""

import math

import pytest

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.compose import load_config
from nemohybrid.config.groups import groups
from nemohybrid.config.training import OptimSection
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import logical_parameters, logical_views
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.run import run
from nemohybrid.train.schedule import learning_rate

TWINS = [name for name in groups()["experiment"] if name.startswith("tiny_")]
QUIET = ["logging.console=quiet", "logging.picture=false", "run.device=cpu", "checkpoint.keep=1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Where the bundled text is prepared, once for all twins."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_trains_ten_steps(name, cache, tmp_path):
    config = load_config([f"experiment={name}", f"run.dir={tmp_path}/run", f"data.cache={cache}", *QUIET])
    trainer = run(config, ParallelContext.single())
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert (trainer.step, len(steps)) == (10, 10)
    losses = [step["loss"] for step in steps]
    assert all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0], losses
    plan = BatchPlan(config.train, config.data.sequence_length)
    rates = [learning_rate(config, plan, step) for step in range(1, 11)]
    assert [step["lr"] for step in steps] == pytest.approx(rates)
    if config.schedule.decay:
        assert rates[-1] == pytest.approx(config.optim.lr * config.schedule.min_lr_ratio), "the decay ends with the run"


VECTORS = ("A_log", "D", "dt_bias", "norm.weight", ".bias")
"""Ends of the names of what is never decayed (Megatron-LM, optimizer/__init__.py: one dimension, or a name in .bias)."""


def test_weight_decay_spares_vectors_and_nothing_else(tiny_config):
    changes = {"linear_bias": True, "moe_latent_size": 8, "conv_kernel": 4}
    model = HybridModel.create(tiny_config("M*-E/*E", **changes))
    groups = build_optimizer(model.parameters(), OptimSection(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        names |= dict.fromkeys(logical_views(name, parameter, parameter), decay[id(parameter)])
    assert names.keys() == logical_parameters(model).keys(), "a parameter is in no group"
    wrong = {name: value for name, value in names.items() if value != (0.0 if name.endswith(VECTORS) else 0.1)}
    assert wrong == {}
    for name in (
        "embedding.weight",
        "output.weight",
        "layers.0.mixer.conv.x",
        "layers.3.mixer.router.gate.weight",
        "layers.3.mixer.latent_up.weight",
        "mtp.0.eh_proj.weight",
    ):
        assert names[name] == 0.1, f"{name} is decayed in Megatron-LM"
    for name in ("layers.0.mixer.A_log", "layers.0.mixer.conv.x.bias", "mtp.0.hnorm.weight", "final_norm.weight"):
        assert names[name] == 0.0, name


def test_a_router_bias_is_no_parameter_to_decay(tiny_config):
    model = HybridModel.create(tiny_config("E"))
    assert [name for name, _ in model.named_parameters() if "expert_bias" in name] == []
    assert "layers.0.mixer.router.expert_bias" in dict(model.named_buffers())


def test_projections_into_the_residual_start_smaller_by_the_root_of_the_layers(tiny_config):
    """init_std / sqrt(layers) for hybrids, MTP blocks and latent projections included (Megatron-LM, output_layer_init)."""
    wide = {"hidden_size": 128, "ffn_hidden_size": 256, "moe_latent_size": 64, "init_std": 0.02}
    values = logical_parameters(HybridModel.create(tiny_config("M*-E/*E", **wide)))
    residual = 0.02 / math.sqrt(4)
    expected = {
        "layers.0.mixer.out_proj.weight": residual,
        "layers.2.mixer.fc2.weight": residual,
        "layers.3.mixer.latent_down.weight": 0.02,
        "layers.3.mixer.latent_up.weight": residual,
        "layers.3.mixer.router.gate.weight": 0.02,
        "layers.3.mixer.shared_expert.fc2.weight": residual,
        "mtp.0.eh_proj.weight": 0.02,
        "mtp.0.layers.0.mixer.out_proj.weight": residual,
        "mtp.0.layers.1.mixer.experts.up": 0.02,
        "mtp.0.layers.1.mixer.experts.down": residual,
    }
    for name, std in expected.items():
        spread = values[name].std().item()
        assert abs(spread / std - 1) < 0.1, f"{name}: std {spread:.4f}, expected {std:.4f}; the smallest has 768 values"
