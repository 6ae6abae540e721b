"""What decays: the rule of Megatron-LM's optimizer, by name, over every kind of parameter there is."""

import fnmatch

from nemohybrid.config.compose import load_config
from nemohybrid.model import HybridModel
from nemohybrid.train.optimizer import build_optimizer

NEVER = ("*norm.weight", "*.bias", "*.A_log", "*.D", "*.dt_bias")
"""Vectors. In Megatron-LM: one dimension, or a name that ends with `.bias`."""
ALWAYS = (
    "embedding.weight",
    "output.weight",
    "*_proj.weight",
    "*.qkv.weight",
    "*.fc[12].weight",
    "*.conv.weight",
    "*.gate.weight",
    "*.experts.up",
    "*.experts.down",
    "*.latent_up.weight",
    "*.latent_down.weight",
)


def test_matrices_decay_and_vectors_do_not():
    words = [
        'model.pattern="M*-E/*E"',
        "model.linear_bias=true",
        "model.attention.qk_norm=true",
        'model.output_norm="M*-E"',
    ]
    config = load_config(["model=tiny_latent_mtp", *words, "model.mamba_bc_norm=true", "data=shakespeare"])
    model = HybridModel(config.model)
    groups = build_optimizer(model.parameters(), config.optim).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        never, always = (any(fnmatch.fnmatch(name, each) for each in names) for names in (NEVER, ALWAYS))
        assert never != always, f"{name}: this test has no opinion"
        assert decay[id(parameter)] == (0.0 if never else config.optim.weight_decay), name
