"""What a recipe multiplies must be a multiple of its block on every tensor rank; asked with recipes of later versions."""

import pytest

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.environment import ParallelSection, PrecisionSection
from nemohybrid.config.rules.precision import mamba_widths, multiple_of, widths_of_the_recipe
from nemohybrid.config.rules.rule import Situation
from nemohybrid.config.run_config import RunConfig
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
    "recipe, multiple",
    [("bf16", 1), ("fp8_delayed", 16), ("fp8_current", 16), ("fp8_block", 16), ("mxfp8", 32), ("nvfp4", 16)],
)
def test_recipes_multiply_in_multiples(recipe, multiple):
    assert multiple_of(recipe) == multiple
    assert multiple_of(f"{recipe}_of_some_kind") == multiple


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
    assert mamba_widths(load_model_config([f"model={model}"]).model, 1)[IN_PROJ] == width


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
    assert message.startswith(f"  precision.recipe={recipe}: takes multiples of {multiple_of(recipe)}, but "), message
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
    assert "but a rank has 1960 channels of an MLP. Legal" in refusal("nemotron_nano_v2_9b", 8, "fp8_current")


FOUR_HEADS = ["model.num_attention_heads=4", "model.num_query_groups=2", 'model.pattern="*"']
WIDE_EXPERTS = ["model.moe_ffn_hidden_size=40", "model.shared_expert_ffn_hidden_size=72", "model.moe_latent_size=24"]


@pytest.mark.parametrize(
    "tensor, overrides, found",
    [
        (1, ["model.hidden_size=100"], "100 hidden channels"),
        (2, ["model.mamba_head_dim=6"], "inputs of the Mamba out_proj"),
        (2, [*FOUR_HEADS, "model.head_dim=12"], "has 24 inputs of the attention out_proj. Legal"),  # qkv is 48 wide
        (4, [*FOUR_HEADS, "model.head_dim=20"], "60 outputs of the attention qkv"),  # a key/value head is repeated
        (2, ['model.pattern="-"', "model.ffn_hidden_size=48"], "has 24 channels of an MLP. Legal"),
        (1, ["model=tiny_moe", *WIDE_EXPERTS], "40 channels of an expert and 72 channels of the shared expert and 24"),
        (1, ["model=tiny_moe", *WIDE_EXPERTS], "24 latent channels. Legal"),
        (1, ["model=tiny_moe", *WIDE_EXPERTS, 'model.pattern="M/E"'], "40 channels of an expert"),
    ],
)
def test_every_width_of_a_rank_is_looked_at(tensor, overrides, found, refusal):
    assert found in refusal("tiny", tensor, "fp8_current", *overrides)


def test_ranks_without_equal_parts_are_a_matter_of_another_rule(refusal):
    assert refusal("nemotron_h_4b", 16, "fp8_current") == ""
