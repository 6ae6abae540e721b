"""What a recipe multiplies must be a multiple of its block on every tensor rank, and a rule must be about something."""

import pytest

from nemohybrid.config.compose import load_config, load_model_config
from nemohybrid.config.environment import ParallelSection
from nemohybrid.config.groups import groups
from nemohybrid.config.precision import PrecisionSection
from nemohybrid.config.products import products
from nemohybrid.config.rules.precision import widths_of_the_recipe
from nemohybrid.config.rules.rule import Situation
from nemohybrid.config.run_config import RunConfig
from nemohybrid.precision.recipe import RECIPES
from nemohybrid.symbols import parse_pattern

IN_PROJ = "outputs of the Mamba in_proj"


@pytest.fixture
def refusal():
    """`refusal("nemotron_h_4b", 2, "fp8_current")`: what the rule says, or an empty string."""

    def ask(model: str, tensor: int, recipe: str, *overrides: str) -> str:
        sizes = load_model_config([f"model={model}", *overrides]).model
        parallel, precision = ParallelSection(tensor=tensor), PrecisionSection(recipe=recipe)
        config = RunConfig(model=sizes, parallel=parallel, precision=precision)
        return str(widths_of_the_recipe(Situation(config, tensor, parse_pattern(sizes.pattern))) or "")

    return ask


@pytest.mark.parametrize(
    "model, width",
    [
        ("nemotron_h_4b", 16496),
        ("nemotron_h_8b", 18560),
        ("nemotron_h_47b", 37120),
        ("nemotron_h_56b", 37120),
        ("nemotron_nano_v2_9b", 22656),
        ("nemotron_nano_v2_12b", 22656),
        ("nemotron3_nano_4b", 17504),
        ("nemotron3_nano_30b", 10304),
        ("nemotron3_super", 18560),
        ("nemotron3_ultra", 35072),
    ],
)
def test_the_width_of_in_proj_is_the_published_one(model, width):
    config = load_model_config([f"model={model}"]).model
    places = products(config, parse_pattern(config.pattern))
    assert {place.outputs for place in places if place.role == "in_proj"} == {width}


@pytest.mark.parametrize(
    "model, tensor, recipe, width",
    [
        ("nemotron3_nano_30b", 8, "fp8_current", 1288),
        ("nemotron_h_4b", 2, "fp8_current", 8248),
        ("nemotron_h_4b", 4, "fp8_current", 4124),
        ("nemotron_h_4b", 8, "fp8_current", 2062),
        ("nemotron3_nano_4b", 4, "fp8_current", 4376),
        ("nemotron_h_4b", 1, "mxfp8", 16496),
        ("nemotron3_nano_30b", 8, "nvfp4", 1288),
    ],
)
def test_an_in_proj_that_a_rank_cannot_multiply_is_refused(model, tensor, recipe, width, refusal):
    message = refusal(model, tensor, recipe)
    takes = f"{recipe} takes multiples of {RECIPES[recipe].multiple}, but a rank has "
    assert message.startswith(f"  precision.recipe={recipe}: {takes}"), message
    assert f"{width} {IN_PROJ}" in message
    assert "Legal: precision.recipe=bf16" in message


@pytest.mark.parametrize(
    "model, tensor, recipe",
    [
        ("nemotron_h_8b", 8, "fp8_current"),
        ("nemotron_h_47b", 8, "fp8_current"),
        ("nemotron_h_56b", 8, "fp8_current"),
        ("nemotron_h_56b", 2, "fp8_current"),
        ("nemotron_nano_v2_9b", 2, "fp8_block"),
        ("nemotron_nano_v2_12b", 4, "fp8_block"),
        ("nemotron_nano_v2_12b", 8, "fp8_block"),
        ("nemotron3_nano_30b", 1, "mxfp8"),
        ("nemotron3_5_lightning", 1, "mxfp8"),
        ("nemotron3_super", 8, "nvfp4"),
        ("nemotron3_super", 2, "mxfp8"),
        ("nemotron3_ultra", 8, "nvfp4"),
        ("nemotron3_ultra", 2, "mxfp8"),
        ("nemotron_h_4b", 1, "fp8_current"),
        ("nemotron_h_4b", 8, "bf16"),
        ("nemotron3_nano_30b", 8, "bf16"),
    ],
)
def test_what_a_rank_can_multiply_passes(model, tensor, recipe, refusal):
    assert refusal(model, tensor, recipe) == ""


def test_the_tensor_ranks_that_would_do_are_named(refusal):
    assert "Legal: parallel.tensor=1, 2, 4; Legal: precision.recipe=bf16" in refusal("nemotron3_nano_30b", 8, "nvfp4")
    assert "parallel.tensor" not in refusal("nemotron_h_4b", 1, "mxfp8"), "no number of ranks mends 16496 outputs"


def test_the_inner_width_of_an_mlp_may_be_what_does_not_fit(refusal):
    """Nano v2 9B on 8 ranks: in_proj would do, but an eighth of 15680 channels does not."""
    message = refusal("nemotron_nano_v2_9b", 8, "fp8_current")
    assert "but a rank has 1960 outputs of an MLP's fc1 and 1960 inputs of an MLP's fc2. Legal" in message
    assert '{name: ["*.fc1", "*.fc2"], recipe: bf16}' in message


FOUR_HEADS = ["model.num_attention_heads=4", "model.num_query_groups=2", 'model.pattern="*"']
WIDE_EXPERTS = ["model.moe_ffn_hidden_size=40", "model.shared_expert_ffn_hidden_size=72", "model.moe_latent_size=24"]


@pytest.mark.parametrize(
    "tensor, overrides, found",
    [
        (1, ["model.hidden_size=100"], "100 inputs of the Mamba in_proj"),
        (2, ["model.mamba_head_dim=6"], "inputs of the Mamba out_proj"),
        (2, [*FOUR_HEADS, "model.head_dim=12"], "has 24 inputs of the attention out_proj. Legal"),  # qkv is 48 wide
        (4, [*FOUR_HEADS, "model.head_dim=20"], "60 outputs of the attention qkv"),  # a key/value head is repeated
        (
            2,
            ['model.pattern="-"', "model.ffn_hidden_size=48"],
            "has 24 outputs of an MLP's fc1 and 24 inputs of an MLP's fc2. Legal",
        ),
        (1, ["model=tiny_moe", *WIDE_EXPERTS], "40 outputs of the MoE experts.up"),
        (1, ["model=tiny_moe", *WIDE_EXPERTS], "24 outputs of the MoE latent_down"),
        (1, ["model=tiny_moe", *WIDE_EXPERTS], "72 inputs of the MoE shared_expert.fc2. Legal"),
        (1, ["model=tiny_moe", *WIDE_EXPERTS, 'model.pattern="M/E"'], "40 inputs of the MoE experts.down"),
    ],
)
def test_every_width_of_a_rank_is_looked_at(tensor, overrides, found, refusal):
    assert found in refusal("tiny", tensor, "fp8_current", *overrides)


def test_ranks_without_equal_parts_are_a_matter_of_another_rule(refusal):
    assert refusal("nemotron_h_4b", 16, "fp8_current") == ""


# --- rules of the policy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, why",
    [
        (
            "{role: router, recipe: bf16}",
            "router can never be quantized: a small error sends a token to another expert",
        ),
        ("{role: vocabulary, recipe: nvfp4}", "can never be quantized"),
        ("{role: eh_proj, recipe: nvfp4}", "Legal: in_proj, out_proj, qkv, o_proj, fc1, fc2, latent, expert"),
        ("{role: conv, recipe: nvfp4}", "can never be quantized"),
        ("{role: qvk, recipe: nvfp4}", "Did you mean 'qkv'?"),
        ("{rol: qkv, recipe: nvfp4}", "Did you mean 'role'?"),
        ("{role: qkv, recipe: nvpf4}", "Did you mean 'nvfp4'"),
        ("{role: qkv}", "names no recipe"),
        ("{role: [], recipe: bf16}", "role=[] names nothing, which would fit everything"),
        ("{layers: [], recipe: bf16}", "layers=[] names nothing"),
        ("{role: qkv, recipe: [bf16]}", "['bf16'] is no recipe"),
        ("{role: [[qkv]], recipe: bf16}", "is no role"),
        ("{layers: last, recipe: bf16}", "Legal: a number, from 0 or -1 from the end"),
        ("{layers: last 150%, recipe: bf16}", "no more than 100%"),
        ("{layers: 1.5, recipe: bf16}", "names no layers"),
        ("{layers: true, recipe: bf16}", "names no layers"),
        ("{kind: M, recipe: bf16, optional: 1}", "not true or false"),
        ("bf16", "is no rule"),
        ("{kind: E, recipe: bf16}", "no layer is of kind E. Kinds: M, -, *"),
        ("{kind: mtp, recipe: bf16}", "no layer is of kind mtp"),
        ("{role: latent, recipe: bf16}", "no product has the role latent"),
        ("{kind: M, role: qkv, recipe: bf16}", "no product is all of that"),
        ("{layers: 7, recipe: bf16}", "the model has layers 0 to 6"),
        ('{name: "layers.*.mixr.in_proj", recipe: bf16}', "Nearest: layers.*.mixer.in_proj"),
        ('{name: "*.router.gate", recipe: bf16}', "router can never be quantized"),
        ('{name: "embedding", recipe: bf16}', "embedding can never be quantized"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_with_what_would_be_right(rule, why, complaint):
    message = complaint(f"precision.rules=[{{kind: M, recipe: bf16}}, {rule}]")
    assert "precision.rules" in message
    assert why in message, message


def test_an_optional_rule_may_fit_nothing_and_a_repeated_one_is_no_mistake(compose):
    rules = "[{kind: mtp, recipe: bf16, optional: true}, {kind: M, recipe: bf16}, {kind: M, recipe: mxfp8}]"
    assert len(compose(f"precision.rules={rules}").precision.rules) == 3


def test_late_recipes_are_judged_too(complaint):
    message = complaint("precision.late.tokens=1e6", "precision.late.rules=[{kind: E, recipe: bf16}]")
    assert "precision.late.rules[0]: fits nothing" in message
    assert "comes after the end of the run" in complaint("train.steps=3", "precision.late.tokens=1e9")
    late = complaint("precision.recipe=fp8_current", "precision.late={tokens: 1000, recipe: mxfp8}", *FITTING)
    assert "mxfp8 takes multiples of 32, but a rank has 656 outputs of the Mamba in_proj" in late


FITTING = ["model.mamba_num_heads=16", "model.mamba_head_dim=16"]


def test_what_a_rule_leaves_in_bf16_may_have_any_width(compose, complaint):
    assert "648 outputs of the Mamba in_proj" in complaint("precision=nvfp4")
    rules = 'precision.rules=[{name: ["*.in_proj"], recipe: bf16}]'
    assert compose("precision=nvfp4", rules).precision.recipe == "nvfp4"


def test_the_emulation_takes_any_width_that_is_whole(compose, complaint):
    """A rehearsal needs no hardware's widths; a block that ranks would cut is another matter."""
    words = ["precision=nvfp4", "precision.backend=emulated"]
    assert compose(*words, "model.hidden_size=100").precision.recipe == "nvfp4"
    assert "324 outputs of the Mamba in_proj" in complaint(*words, "parallel.tensor=2", world_size=2)
    assert "Legal: precision.backend=emulated" in complaint("precision=nvfp4")


@pytest.mark.parametrize(
    "model, preset",
    [
        ("nemotron_h_8b", "nemotron_h_fp8"),
        ("nemotron_h_56b", "nemotron_h_fp8"),
        ("nemotron_nano_v2_12b", "nano2_fp8"),
        ("nemotron3_super", "nemotron3_super_nvfp4"),
        ("nemotron3_ultra", "nemotron3_ultra_nvfp4"),
    ],
)
def test_a_published_policy_is_rehearsed_on_the_small_twin(model, preset):
    load_config([f"experiment=tiny_{model}", f"precision={preset}", "precision.backend=emulated"])


@pytest.mark.parametrize("preset", groups()["precision"])
def test_every_preset_fits_a_model_with_all_kinds_of_layers(preset, compose):
    overrides = ["model.mamba_num_heads=32", "model.mamba_head_dim=8"]
    assert compose("model=tiny_latent_mtp", f"precision={preset}", *overrides).precision.recipe in RECIPES
