"""Transformer Engine, on a fake of its signatures: which recipe with which fields, in which regions, and whose weight."""

import sys
from dataclasses import asdict, make_dataclass, replace

import fake_transformer_engine as fake
import pytest
import torch
from passes import distance, passes
from torch import nn

from nemohybrid.errors import ConfigError, TrainingError
from nemohybrid.precision.backends import choose, surround, te_recipes, transformer_engine
from nemohybrid.precision.backends.te_recipes import described, found
from nemohybrid.precision.backends.transformer_engine import EngineGemm
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.gemm import plain_gemm
from nemohybrid.precision.recipe import RECIPES, GemmRecipe, Operand, Product
from nemohybrid.precision.slot import Slot

CUDA = torch.device("cuda")
E4M3, HYBRID, E2M1 = fake.Format.E4M3, fake.Format.HYBRID, fake.Format.E2M1
SPLIT, FAST = fake.MMParams(True), fake.MMParams(False)
NOT_ATTENTION = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
NVFP4 = NOT_ATTENTION | {
    "disable_rht": False,
    "disable_stochastic_rounding": False,
    "disable_2d_quantization": False,
    "row_scaled_activation": False,
    "nvfp4_4over6": "none",
    "nvfp4_4over6_e4m3_use_256": "all",
    "nvfp4_4over6_err_mode": "MAE",
    "fp4_format": E2M1,
    "fp8_format": E4M3,
}
EXPECTED = {
    "fp8_current": (
        fake.Float8CurrentScaling,
        NOT_ATTENTION
        | {"use_power_2_scales": False, "fp8_format": HYBRID}
        | {"fp8_gemm_fprop": FAST, "fp8_gemm_dgrad": SPLIT, "fp8_gemm_wgrad": SPLIT},
    ),
    "fp8_delayed": (
        fake.DelayedScaling,
        NOT_ATTENTION
        | {"margin": 0, "fp8_format": HYBRID, "amax_history_len": 1024, "amax_compute_algo": "max"}
        | {"scaling_factor_compute_algo": None, "reduce_amax": False},
    ),
    "fp8_block": (
        fake.Float8BlockScaling,
        NOT_ATTENTION
        | {"use_f32_scales": False, "fp8_format": E4M3}
        | {"x_block_scaling_dim": 1, "w_block_scaling_dim": 2, "grad_block_scaling_dim": 1}
        | {"fp8_gemm_fprop": SPLIT, "fp8_gemm_dgrad": SPLIT, "fp8_gemm_wgrad": SPLIT},
    ),
    "mxfp8": (
        fake.MXFP8BlockScaling,
        NOT_ATTENTION | {"margin": 0, "fp8_format": E4M3, "enable_2d_quantization": False},
    ),
    "nvfp4": (fake.NVFP4BlockScaling, NVFP4),
    "nvfp4_no_rht": (fake.NVFP4BlockScaling, NVFP4 | {"disable_rht": True}),
    "nvfp4_no_sr": (fake.NVFP4BlockScaling, NVFP4 | {"disable_stochastic_rounding": True}),
    "nvfp4_1d": (fake.NVFP4BlockScaling, NVFP4 | {"disable_2d_quantization": True}),
}


@pytest.fixture
def installed(monkeypatch):
    """Where it is installed, on a B200."""
    engine = fake.Engine()
    engine.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    found.cache_clear()
    yield engine
    found.cache_clear()


def tensors(tokens=48):
    g = torch.Generator().manual_seed(0)
    x, dy = torch.randn(tokens, 64, generator=g).bfloat16(), torch.randn(tokens, 32, generator=g).bfloat16()
    return x, torch.randn(32, 64, generator=g), dy


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", EXPECTED)
def test_each_recipe_is_the_object_with_all_of_its_fields(recipe, installed):
    """The fake's own defaults are all others, so that a field that is not given is found."""
    kind, fields = EXPECTED[recipe]
    built = found().build(described(RECIPES[recipe]))
    assert type(built) is kind
    assert {name: getattr(built, name) for name in asdict(built)} == fields


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("name", ["fp8_current", "fp8_block"])
def test_scales_are_powers_of_two_as_the_recipe_says_and_not_the_environment(name, power_of_2, installed):
    """They are attributes of the class, from NVTE_FP8_..., and no fields: whoever gives the field alone changes nothing."""
    recipe = with_powers(RECIPES[name], power_of_2)
    built = found().build(described(recipe))
    for quantizer in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        assert getattr(built, quantizer) == fake.QParams(power_2_scale=power_of_2, amax_epsilon=0.0)
    assert (built.use_power_2_scales if name == "fp8_current" else not built.use_f32_scales) == power_of_2


def with_powers(recipe: GemmRecipe, power_of_2: bool) -> GemmRecipe:
    def of(product: Product) -> Product:
        return Product(*(replace(operand, power_of_2=power_of_2) for operand in (product.left, product.right)))

    return GemmRecipe("own", of(recipe.fprop), of(recipe.dgrad), of(recipe.wgrad))


def test_variants_have_their_fields():
    mx, square = Operand("mx", "e4m3"), Operand("mx", "e4m3", square=True)
    recipe = GemmRecipe("mx_2d", Product(mx, square), Product(mx, square), Product(mx, mx))
    assert described(recipe).fields["enable_2d_quantization"]
    current, gradient = Operand("current", "e4m3"), Operand("current", "e4m3")
    recipe = GemmRecipe("e4m3", Product(current, current), Product(gradient, current), Product(gradient, current))
    assert described(recipe).fields["fp8_format"] == "E4M3"


@pytest.mark.parametrize("name", ["mor", "mor_block", "bf16"])
def test_what_it_has_no_recipe_for_is_refused(name):
    assert described(RECIPES[name]) is None
    assert "no recipe with these operands" in transformer_engine.obstacle(RECIPES[name], CUDA)


def test_no_recipe_is_taken_for_one_that_differs_in_one_operand():
    for recipe in (RECIPES[name] for name in EXPECTED):
        for product in ("fprop", "dgrad", "wgrad"):
            for side in ("left", "right"):
                of = getattr(recipe, product)
                operand = getattr(of, side)
                other = replace(operand, format="e5m2" if operand.format != "e5m2" else "e4m3")
                changed = replace(recipe, **{product: replace(of, **{side: other})})
                assert described(changed) is None or (product, side) == ("dgrad", "left"), (recipe.name, product, side)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("recipe", [name for name in EXPECTED if name != "fp8_delayed"])
def test_each_call_has_its_own_region(recipe, old, installed, monkeypatch):
    """The fake multiplies plainly, so that gradients must be plain ones; tokens are filled up, and a bias is added."""
    installed.install(monkeypatch, old)
    gemm, (x, w, dy), bias = EngineGemm(RECIPES[recipe], Slot("a")), tensors(37), torch.ones(32)
    for got, wanted in zip(passes(gemm, x, w, dy, bias), passes(plain_gemm, x, w, dy, bias), strict=True):
        assert got.dtype == wanted.dtype
        assert distance(got, wanted) < 1e-2
    (call,) = installed.calls
    assert [type(region) for region in call.regions] == [EXPECTED[recipe][0]]
    assert call.rows == (64 if recipe not in ("fp8_current", "fp8_block") else 48)
    assert call.dtype == torch.bfloat16
    assert installed.renewed == 1


def test_leading_dimensions_are_kept(installed):
    gemm, (x, w, _) = EngineGemm(RECIPES["fp8_current"], Slot("a")), tensors(48)
    assert gemm(x.view(2, 3, 8, 64), w, None).shape == (2, 3, 8, 32)


def test_our_parameter_stays_the_only_one(installed):
    """No state of a checkpoint is added, none is copied, and none of it is held after a call."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(tensors()[1])
            self.gemm = EngineGemm(RECIPES["fp8_current"], Slot("a"))

    layer, (x, _, dy) = Layer(), tensors()
    layer.gemm(x, layer.weight, None).backward(dy)
    assert list(layer.state_dict()) == ["weight"]
    assert layer.weight.grad.dtype == torch.float32
    (linear,) = installed.linears
    assert not list(linear.parameters())
    assert "weight" not in vars(linear)


def test_a_weight_is_quantized_in_the_first_microbatch_of_a_step(installed):
    clock, (x, w, dy) = Clock(), tensors()
    gemm = EngineGemm(RECIPES["fp8_current"], Slot("a", clock=clock))
    w.requires_grad_()
    for _ in range(2):
        for _ in range(3):
            gemm(x, w, None).backward(dy)
        with torch.no_grad():
            w.sub_(w.grad)
        clock.weights_changed()
    assert [call.is_first_microbatch for call in installed.calls] == [True, False, False] * 2


def test_what_an_evaluation_quantized_does_not_serve_training(installed):
    gemm, (x, w, dy) = EngineGemm(RECIPES["fp8_current"], Slot("a")), tensors()
    with torch.no_grad():
        gemm(x, w, None)
    gemm(x, w.requires_grad_(), None).backward(dy)
    assert [(call.is_first_microbatch, call.trains) for call in installed.calls] == [(True, False), (True, True)]


def test_a_weight_that_is_there_for_a_while_only_is_quantized_each_time(installed):
    gemm, (x, w, _) = EngineGemm(RECIPES["fp8_current"], Slot("a", keeps=False)), tensors()
    gemm(x, w, None)
    gemm(x, w, None)
    assert [call.is_first_microbatch for call in installed.calls] == [None, None]


# --- delayed scaling -------------------------------------------------------------------------------------------------


def test_delayed_scaling_has_one_region_around_the_model(installed):
    """All layers are in it, once each, and scales are renewed at its end alone."""
    choice, (x, w, dy) = choose(RECIPES["fp8_delayed"], "transformer_engine", CUDA), tensors()
    gemms = [choice.gemm(choice.recipe, Slot(name)) for name in ("a", "b")]
    region = surround([choice])
    for microbatch in range(2):
        with region():
            outputs = [gemm(x, w.requires_grad_(), None) for gemm in gemms]
        assert installed.renewed == microbatch + 1
        for y in outputs:
            y.backward(dy)
    assert len(installed.calls) == 4
    assert all([type(of) for of in call.regions] == [fake.DelayedScaling] for call in installed.calls)


def test_delayed_scaling_outside_of_it_is_an_error(installed):
    gemm, (x, w, _) = EngineGemm(RECIPES["fp8_delayed"], Slot("layers.3.mixer.fc1")), tensors()
    with pytest.raises(TrainingError, match=r"layers.3.mixer.fc1: .*train.recompute=none"):
        gemm(x, w, None)


def test_a_region_ends_also_when_the_model_fails(installed):
    region = surround([choose(RECIPES["fp8_delayed"], "transformer_engine", CUDA)])
    with pytest.raises(ZeroDivisionError), region():
        raise ZeroDivisionError
    assert not installed.regions
    test_delayed_scaling_outside_of_it_is_an_error(installed)


def test_delayed_scaling_beside_another_recipe_is_refused(installed):
    choices = [choose(RECIPES[name], "transformer_engine", CUDA) for name in ("fp8_delayed", "mxfp8")]
    with pytest.raises(ConfigError, match=r"there are fp8_delayed, mxfp8. Legal: .*precision.backend=torch_native"):
        surround(choices)
    surround([choices[0], choose(RECIPES["bf16"], "auto", CUDA)])
    surround([choices[0], choose(RECIPES["mxfp8"], "emulated", CUDA)])


def test_other_recipes_need_no_region_around(installed):
    with surround([choose(RECIPES[name], "transformer_engine", CUDA) for name in ("fp8_current", "mxfp8")])():
        assert not installed.regions


# --- where it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", EXPECTED)
def test_it_is_the_first_choice_where_it_runs(recipe, installed):
    assert choose(RECIPES[recipe], "auto", CUDA).name == "transformer_engine"


@pytest.mark.parametrize(
    "recipe, predicate",
    [
        ("fp8_current", "is_fp8_available"),
        ("fp8_delayed", "is_fp8_available"),
        ("fp8_block", "is_fp8_block_scaling_available"),
        ("mxfp8", "is_mxfp8_available"),
        ("nvfp4", "is_nvfp4_available"),
    ],
)
def test_its_own_word_counts(recipe, predicate, installed, monkeypatch):
    installed.lacking[predicate] = "Device compute capability 10.0 or higher required."
    wanted = "Transformer Engine 2.20.2: Device compute capability 10.0 or higher required."
    assert transformer_engine.obstacle(RECIPES[recipe], CUDA) == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in transformer_engine.obstacle(RECIPES[recipe], CUDA)


def test_nvfp4_is_for_the_machines_it_trains_on(installed, monkeypatch):
    """Its predicate takes every one from 10.0 on; consumer cards (12.0) have no training."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert "10.0 and 10.3 only, it has 12.0" in transformer_engine.obstacle(RECIPES["nvfp4"], CUDA)
    assert transformer_engine.obstacle(RECIPES["fp8_current"], CUDA) is None


def test_what_an_older_version_does_not_have_is_named(installed, monkeypatch):
    recipes = sys.modules["transformer_engine.common.recipe"]
    monkeypatch.setattr(recipes, "MXFP8BlockScaling", old_mx())
    mx, square = Operand("mx", "e4m3"), Operand("mx", "e4m3", square=True)
    two_d = GemmRecipe("mx_2d", Product(mx, square), Product(mx, square), Product(mx, mx))
    assert "no MXFP8BlockScaling(enable_2d_quantization=True)" in transformer_engine.obstacle(two_d, CUDA)
    assert transformer_engine.obstacle(RECIPES["mxfp8"], CUDA) is None
    assert found().build(described(RECIPES["mxfp8"])).margin == 0
    monkeypatch.delattr(recipes, "NVFP4BlockScaling")
    assert transformer_engine.obstacle(RECIPES["nvfp4"], CUDA) == (
        "Transformer Engine 2.20.2 has no NVFP4BlockScaling; a newer one has"
    )


def old_mx():
    return make_dataclass("MXFP8BlockScaling", [("margin", int), ("fp8_format", fake.Format)], bases=(fake.Recipe,))


def test_a_machine_without_it_is_told_how_to_install_it(monkeypatch):
    found.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(te_recipes.importlib.util, "find_spec", lambda _: None)
    says = transformer_engine.obstacle(RECIPES["fp8_current"], CUDA)
    assert says.startswith("transformer_engine is not installed; pip install ")
    with pytest.raises(
        ConfigError, match="transformer_engine cannot carry out fp8_current on cuda: transformer_engine is not"
    ):
        choose(RECIPES["fp8_current"], "transformer_engine", CUDA)


def test_one_that_does_not_import_says_why(installed, monkeypatch):
    def fails(name):
        raise OSError("libcudnn.so.9: cannot open shared object file\nmore")

    found.cache_clear()
    monkeypatch.setattr(te_recipes.importlib, "import_module", fails)
    says = transformer_engine.obstacle(RECIPES["fp8_current"], CUDA)
    assert says.startswith("transformer_engine does not import: libcudnn.so.9: cannot open shared object file; ")
    assert "runs on NVIDIA GPUs only" in transformer_engine.obstacle(RECIPES["mxfp8"], torch.device("cpu"))
