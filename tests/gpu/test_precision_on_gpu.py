"""Low precision on the hardware it is for: the bytes of the numerics, products near the emulated ones, a run that learns.

On the CPU what it cannot multiply is multiplied by fakes that ask of their arguments what a GPU asks.
"""

import json

import fake_scaled_mm
import fake_transformer_engine
import pytest
import torch
import torch.nn.functional as F
from passes import distance, passes

from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.world import choose_device
from nemohybrid.precision.backends import BACKENDS, emulated
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.backends.packed import MULTIPLES, Packed, pack, padded
from nemohybrid.precision.backends.te_recipes import found
from nemohybrid.precision.backends.torch_native import NativeGemm, prepare
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.delayed import DelayedScales
from nemohybrid.precision.recipe import RECIPES, GemmRecipe, Operand
from nemohybrid.precision.slot import Slot
from nemohybrid.train.run import run

pytestmark = pytest.mark.filterwarnings(  # what torch.compile says of itself, when the first bytes are made
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
NATIVE = [name for name, of in RECIPES.items() if of.is_quantized and not name.startswith("mor")]
OPERANDS = list({operand: None for name in NATIVE for operand in RECIPES[name].operands})
CROSSING = [operand for operand in OPERANDS if not operand.hadamard]
"""Of transformed ones the sums of 16 may differ in their last digit between devices."""
ENGINE = ["fp8_current", "fp8_block", "mxfp8", "nvfp4_no_sr"]
SIZES = {"cpu": (37, 144, 48), "cuda": (1000, 4096, 6144)}
"""Tokens, which are no multiple of anything, inputs and outputs."""


@pytest.fixture
def native(device, monkeypatch):
    """`native("mxfp8")` asserts that torch multiplies by a recipe here; skips where the hardware is another one."""
    if device == "cpu":
        monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm.scaled_mm)
    return lambda recipe: None if device == "cpu" else _check("torch_native", RECIPES[recipe])


@pytest.fixture
def engine(device, monkeypatch):
    """The same of Transformer Engine, which multiplies plainly on the CPU."""
    if device == "cuda":
        yield lambda recipe: _check("transformer_engine", RECIPES[recipe])
        return
    fake_transformer_engine.Engine().install(monkeypatch)
    found.cache_clear()
    yield lambda recipe: None
    found.cache_clear()


def _check(backend: str, recipe: GemmRecipe) -> None:
    obstacle = BACKENDS[backend].obstacle(recipe, torch.device("cuda"))
    if obstacle and ("ompute capability" in obstacle or "is not installed" in obstacle):
        pytest.skip(obstacle)
    assert obstacle is None


def tensors(device, tokens, inputs, outputs):
    """x, W and dy: rows of very different size, one of zeros."""
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, width, generator=g) for width in (inputs, outputs))
    x, dy = ((t * 2.0 ** torch.randint(-6, 6, (tokens, 1), generator=g)).bfloat16() for t in (x, dy))
    x[1] = 0
    return x.to(device), (torch.randn(outputs, inputs, generator=g) * inputs**-0.5).to(device), dy.to(device)


def slot_for(recipe: GemmRecipe, device: str) -> Slot:
    formats = [recipe.fprop.left.format, recipe.fprop.right.format, recipe.dgrad.left.format]
    scales = DelayedScales(formats, device=torch.device(device))
    scales.scale.copy_(torch.tensor([17.0, 500.0, 900.0]))
    return Slot("layers.0.mixer.fc1", clock=Clock(seed=3), scales=scales)


def bytes_of(packed: Packed) -> list[torch.Tensor]:
    return [t.flatten().view(torch.uint8).cpu() for t in (packed.codes, *packed.scales)]


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_bytes_are_those_of_the_numerics(device, operand, transposed):
    """Of those that one scale has also where a compiler makes two kernels of them; of a transposed tensor too."""
    slot, x = slot_for(RECIPES["fp8_delayed"], device), tensors(device, *SIZES[device])[0]
    x = padded(x.T if transposed else x, MULTIPLES[operand.scaling])
    random = torch.randint(0, 256, x.shape, dtype=torch.uint8, device=device) if operand.stochastic else None
    wanted = pack(emulated.quantize(x, operand, slot, "x", None, random), operand)
    for got, expected in zip(bytes_of(prepare(x, operand, slot, "x", random)), bytes_of(wanted), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("operand", CROSSING, ids=str)
def test_bytes_are_those_of_the_cpu(device, operand):
    slot, x = slot_for(RECIPES["fp8_delayed"], device), tensors(device, *SIZES[device])[0]
    there, here = (
        prepare(x, operand, slot, "x"),
        prepare(x.cpu(), operand, slot_for(RECIPES["fp8_delayed"], "cpu"), "x"),
    )
    assert all(map(torch.equal, bytes_of(there), bytes_of(here)))


@pytest.mark.parametrize("recipe", NATIVE)
def test_products_are_those_of_the_emulation(device, recipe, native):
    """Forward, dx and dW within 1e-3; rounding at random draws the same bits."""
    native(recipe)
    of, given = RECIPES[recipe], tensors(device, *SIZES[device])
    mine, reference = (passes(kind(of, slot_for(of, device)), *given) for kind in (NativeGemm, EmulatedGemm))
    for got, wanted in zip(mine, reference, strict=True):
        assert wanted.abs().max() > 0
        assert distance(got, wanted) <= 1e-3


@pytest.mark.parametrize("recipe", ["fp8_current", "nvfp4"])
def test_products_are_the_same_every_time(device, recipe, native):
    native(recipe)
    of, given = RECIPES[recipe], tensors(device, *SIZES[device])
    one, other = (passes(NativeGemm(of, slot_for(of, device)), *given) for _ in range(2))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("recipe", ENGINE)
def test_transformer_engine_multiplies_what_we_do(device, recipe, engine):
    """Gradients within 1e-3; the forward product of fp8_current it sums faster and less exactly. The fake quantizes nothing."""
    engine(recipe)
    of, given = RECIPES[recipe], tensors(device, *SIZES[device])
    mine, theirs = (
        passes(kind(of, slot_for(of, device)), *given) for kind in (EmulatedGemm, BACKENDS["transformer_engine"].gemm)
    )
    forward, *bars = (0.2, 0.2, 0.3) if device == "cpu" else (2e-2, 1e-3, 1e-2)
    for got, wanted, bar in zip(theirs, mine, (forward, *bars), strict=True):
        assert distance(got, wanted) <= bar


def test_a_run_in_fp8_learns_what_the_emulation_learns(device, configure, tmp_path):
    """Ten steps; who multiplied is in the run's own folder."""
    words = ["precision.recipe=fp8_current", "model.mamba_head_dim=16", "model.mamba_num_heads=16", "train.steps=10"]
    losses = {}
    for backend in ("torch_native", "emulated"):
        config = configure(device, *words, f"precision.backend={backend}", f"run.dir={tmp_path}/{backend}")
        run(config, ParallelContext.single(choose_device(device, local_rank=0)))
        losses[backend] = [r["loss"] for r in read_metrics(tmp_path / backend / "metrics.jsonl") if "loss" in r]
        saved = json.loads((tmp_path / backend / "precision.json").read_text())
        assert saved["backends"]["fp8_current"]["backend"] == backend
    assert losses["emulated"][-1] < losses["emulated"][0]
    assert losses["torch_native"] == pytest.approx(losses["emulated"], rel=1e-2)


def test_an_operand_that_no_hardware_has_is_refused(device):
    product = RECIPES["fp8_current"].dgrad
    own = GemmRecipe("own", product, product, type(product)(product.left, Operand("current", "e5m2")))
    assert "E5M2 with E5M2" in str(BACKENDS["torch_native"].obstacle(own, torch.device(device)))
