"""Counted parameters are those of the model, for every shipped size and every option that has parameters."""

import pytest

from nemohybrid.config.accounting import Cost, costs_by_part, total_cost
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.groups import groups
from nemohybrid.model.count import built_parameters
from nemohybrid.plan.hardware import peak_flops

OPTIONS = [
    "model.activation=swiglu",
    "model.linear_bias=true",
    "model.tie_embeddings=true",
    "model.conv_bias=false",
    "model.conv_kernel=2",
    "model.vocab_multiple=128",
    "model.shared_expert_ffn_hidden_size=0",
    "model.mamba_num_groups=4",
    "model.num_query_groups=1",
    "model.hidden_size=72",
    "model.mtp.repeat_block=false",
    "model.attention.qk_norm=true",
    "model.attention.v_norm=true",
    "model.mamba_bc_norm=true",
    "model.mamba_x_norm=true",
    'model.output_norm="M*"',
    'model.pattern="EE"',
]


def counted_and_built(*overrides: str) -> tuple[dict[str, int], dict[str, int]]:
    config = load_model_config(overrides).model
    counted = {part: cost.parameters for part, cost in costs_by_part(config, 64).items()}
    return counted, built_parameters(config)


@pytest.mark.parametrize("name", groups()["model"])
def test_the_count_of_a_shipped_model_is_that_of_the_model_built(name):
    counted, built = counted_and_built(f"model={name}")
    assert counted == built


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model", ["tiny", "tiny_moe", "tiny_latent_mtp"])
def test_the_count_follows_every_option_that_has_parameters(model, option):
    counted, built = counted_and_built(f"model={model}", option)
    assert counted == built, option


def test_all_options_together_are_counted_right():
    pattern = 'model.pattern="M-*E"'
    counted, built = counted_and_built("model=tiny_moe", pattern, *OPTIONS[:-1])
    assert counted == built


def test_swiglu_is_known_to_have_a_third_matrix():
    """Guards the comparison itself: both sides could be deaf to an option."""
    plain, gated = (counted_and_built("model=tiny", f"model.activation={a}")[0] for a in ("squared_relu", "swiglu"))
    assert gated["-"] - plain["-"] == 3 * 128 * 512, "three MLPs, one matrix of hidden x 4 hidden each"


def test_active_parameters_leave_out_the_experts_a_token_does_not_visit():
    m = load_model_config(["model=tiny_moe"]).model
    cost = total_cost(m, 64)
    expert = 2 * m.hidden_size * (m.moe_ffn_hidden_size or 0)
    layers = m.pattern.count("E")
    assert cost.parameters - cost.active == layers * expert * (m.num_experts - m.moe_top_k)


def test_flops_of_a_dense_stack_are_two_per_weight_and_token():
    m = load_model_config(["model=tiny", 'model.pattern="--"']).model
    cost = costs_by_part(m, 64)["-"]
    assert cost.flops == 2 * (cost.parameters - 2 * m.hidden_size) == cost.flops_megatron


def test_attention_flops_count_the_causal_half_of_the_products():
    m = load_model_config(["model=tiny", 'model.pattern="*"']).model
    short, long = (costs_by_part(m, length)["*"].flops for length in (64, 128))
    q = (m.num_attention_heads or 0) * (m.head_dim or 0)
    assert long - short == 4 * q * 64 / 2, "scores and values, 2 flops each, over half the keys"


def test_costs_add_and_repeat():
    assert Cost(1, 2, 3.0, 4.0) * 2 + Cost(1, 1, 1.0, 1.0) == Cost(3, 5, 7.0, 9.0)


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA GB200", 2.5e15), ("NVIDIA B200", 2.25e15), ("CPU", None)],
)
def test_peaks_are_found_by_the_name_of_the_device(name, peak):
    assert peak_flops(name) == peak


def test_a_given_peak_wins():
    assert peak_flops("NVIDIA H100 80GB HBM3", 100) == 100e12
