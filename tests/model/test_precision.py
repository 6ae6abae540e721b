"""The products of built models as policies and recipes see them."""

from dataclasses import replace

import pytest
import torch

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import AttentionConfig, ModelConfig, MTPConfig
from nemohybrid.config.products import products
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.precision import sites
from nemohybrid.model.stage import Stage
from nemohybrid.parallel.context import Axes, Group, ParallelContext
from nemohybrid.precision.place import ROLES, Place
from nemohybrid.symbols import parse_pattern

SIZES = {"hidden_size": 64, "vocab_size": 61, "num_attention_heads": 8, "num_query_groups": 2, "num_experts": 8}
MODELS = {
    "all": ModelConfig(pattern="M*-E/*E/*E", **SIZES),
    "latent": ModelConfig(
        pattern="ME*-/ME/ME", moe_latent_size=16, activation="swiglu", mtp=MTPConfig(repeat_block=False), **SIZES
    ),
    "unshared": ModelConfig(pattern="E", shared_expert_ffn_hidden_size=0, linear_bias=True, **SIZES),
    "norms": ModelConfig(pattern="*M", attention=AttentionConfig(qk_norm=True), tie_embeddings=True, **SIZES),
}
for _model in MODELS.values():
    derive_sizes(_model)
LAYOUTS = [
    Axes(),
    Axes(tensor=2),
    Axes(tensor=4, sequence=False),
    Axes(expert=2, expert_tensor=1),
    Axes(tensor=4, expert=2, expert_tensor=2),
]


def built(config: ModelConfig, axes: Axes) -> HybridModel:
    """A rank of an imaginary job, on meta."""
    with torch.device("meta"):
        return HybridModel(config, ParallelContext.imaginary(axes))


def place_of(slot) -> Place:
    return Place(**{name: getattr(slot, name) for name in Place.__dataclass_fields__})


@pytest.mark.parametrize("axes", LAYOUTS, ids=lambda a: f"TP{a.tensor}-EP{a.expert}x{a.width}")
@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_knows_the_products_of_the_model_that_it_builds(name, axes):
    """Names, roles, layers and widths: what is refused is what a rank would have multiplied."""
    config = MODELS[name]
    slots = [place_of(site.slot) for site in sites(built(config, axes))]
    places = products(config, parse_pattern(config.pattern), axes.tensor, axes.width)
    wanted = [replace(p, experts=p.experts // axes.expert) if p.experts else p for p in places]
    assert sorted(slots, key=lambda p: p.name) == sorted(wanted, key=lambda p: p.name)


def test_every_other_product_can_never_be_quantized():
    model = built(MODELS["latent"], Axes())
    named = {id(module): name for name, module in model.named_modules()}
    known = {named[id(site.module)] for site in sites(model)}
    others = {name for name, module in model.named_modules() if hasattr(module, "gemm") and name not in known}
    assert {name.rpartition(".")[2] for name in others} == {"gate", "eh_proj", "embedding", "output"}
    assert {getattr(model.get_submodule(name), "role", "") for name in others} == {"router", "eh_proj", "vocabulary"}
    assert all(site.slot.role in ROLES for site in sites(model))


def test_the_ranks_of_a_pipeline_have_the_products_of_the_whole_model_under_their_numbers():
    config = MODELS["latent"]
    whole = [place_of(site.slot) for site in sites(built(config, Axes()))]
    stages, shares = (Stage("M", 0, 0, 2), Stage("E*-", 1, 1, 2)), []
    for rank, stage in enumerate(stages):
        with torch.device("meta"):
            model = HybridModel(config, ParallelContext.imaginary(Axes(pipeline=2), rank), [stage])
        shares += [place_of(site.slot) for site in sites(model)]
    assert shares == whole


def parts_of(sequence: bool, model: str = "latent") -> dict[str, tuple[str, int]]:
    """Last words of names -> the tensors whose parts ranks exchange, and the part that draws for itself."""
    context = replace(ParallelContext.imaginary(Axes(tensor=2, sequence=sequence)), tensor=Group(2, 1))
    with torch.device("meta"):
        model = HybridModel(MODELS[model], context)
    slots = [site.slot for site in sites(model)]
    return {slot.name.rpartition(".mixer.")[2]: (" ".join(slot.parts), slot.part) for slot in slots}


def test_ranks_exchange_what_is_largest_in_tensors_of_which_each_has_a_part():
    """Outputs are cut: of weight and gradient. Inputs are: of weight and input, and all round the same gradient alike."""
    found = parts_of(sequence=True)
    columns, rows = ("w dy", 1), ("x w", 0)
    assert {found[name] for name in ("in_proj", "qkv", "fc1", "shared_expert.fc1", "experts.up")} == {columns}
    assert {found[name] for name in ("out_proj", "fc2", "shared_expert.fc2", "experts.down")} == {rows}
    assert found["latent_up"] == found["latent_down"] == ("x dy", 1), "each rank has other tokens"


def test_what_every_rank_computes_alike_it_draws_alike():
    """Else copies of a weight would drift apart."""
    assert parts_of(sequence=False)["latent_down"] == ("", 0)


def test_one_rank_exchanges_nothing():
    assert all(not site.slot.parts and site.slot.part == 0 for site in sites(built(MODELS["latent"], Axes())))


def test_experts_on_ranks_of_their_own_draw_on_each_for_themselves():
    context = replace(ParallelContext.imaginary(Axes(tensor=2, expert=2, expert_tensor=1)), tensor=Group(2, 1))
    with torch.device("meta"):
        model = HybridModel(MODELS["all"], context)
    experts = [site.slot for site in sites(model) if site.slot.role == "expert"]
    assert {(tuple(slot.parts), slot.part) for slot in experts} == {((), 1)}, "nobody else has a part of them"
