"""torch's own products: the bytes are those of the numerics, in the order in which hardware reads them, and the product theirs.

What a CPU cannot multiply is multiplied by a fake that asks of its arguments what a GPU asks.
"""

from dataclasses import replace

import fake_scaled_mm
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from passes import distance, passes
from torch._dynamo.backends.common import aot_autograd

from nemohybrid.precision.backends import emulated, torch_native, torch_obstacles
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.backends.packed import MULTIPLES, padded, swizzled, two_a_byte
from nemohybrid.precision.backends.torch_native import NativeGemm, prepare
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.delayed import DelayedScales
from nemohybrid.precision.health import Health
from nemohybrid.precision.recipe import BF16, E5M2, RECIPES, GemmRecipe, Operand, Product
from nemohybrid.precision.slot import Slot

CPU = torch.device("cpu")
SQUARE, E4M3_LINES = Operand("block", "e4m3", square=True), Operand("block", "e4m3")
NATIVE = [name for name, r in RECIPES.items() if r.is_quantized and not name.startswith("mor")]
ON_CPU = ["fp8_current", "fp8_delayed"]
OPERANDS = {operand: None for name in NATIVE for operand in RECIPES[name].operands}


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU that multiplies everything."""
    monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm.scaled_mm)


def tensors(tokens, inputs, outputs, dtype=torch.bfloat16):
    """x, W, dy; rows of very different size, a row and a block of zeros."""
    g = torch.Generator().manual_seed(tokens + inputs)
    x, dy = (torch.randn(tokens, width, generator=g).to(dtype) for width in (inputs, outputs))
    x, dy = (t * 2.0 ** torch.randint(-6, 6, (tokens, 1), generator=g).to(dtype) for t in (x, dy))
    x[1], x[:, :16] = 0, 0
    return x, torch.randn(outputs, inputs, generator=g) / 8, dy


def slot_for(recipe, seed=3):
    formats = [recipe.fprop.left.format, recipe.fprop.right.format, recipe.dgrad.left.format]
    scales = DelayedScales(formats) if recipe.is_delayed else None
    if scales is not None:
        scales.scale.copy_(torch.tensor([17.0, 500.0, 900.0]))
    return Slot("layers.0.mixer.fc1", clock=Clock(seed=seed), scales=scales)


def both(recipe, tokens, inputs, outputs, dtype=torch.bfloat16, bias=None):
    x, w, dy = tensors(tokens, inputs, outputs, dtype)
    kinds = NativeGemm, EmulatedGemm
    return [passes(kind(recipe, slot_for(recipe)), x, w, dy, bias) for kind in kinds]


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (150, 304), (16, 544)])
def test_bytes_are_the_numerics_in_the_order_of_the_hardware(operand, shape):
    """Each code and each scale is looked up where the hardware reads it: equal, to the last bit, and zeros around."""
    slot = slot_for(RECIPES["fp8_delayed"])
    x = tensors(*shape, 16)[0]
    random = torch.randint(0, 256, x.shape, dtype=torch.uint8) if operand.stochastic else None
    packed = prepare(x, operand, slot, "x", random)
    wanted = emulated.quantize(x, operand, slot, "x", None, random)
    values = fake_scaled_mm._values(packed.codes)
    assert torch.equal(values[: shape[0], : shape[1]], wanted.values.double())
    assert values.shape == tuple(-(-size // MULTIPLES[operand.scaling]) * MULTIPLES[operand.scaling] for size in shape)
    assert values[shape[0] :].eq(0).all()
    assert values[:, shape[1] :].eq(0).all()
    got = fake_scaled_mm.numbers(packed.codes, list(packed.scales), *_names(packed))
    torch.testing.assert_close(got[: shape[0], : shape[1]].float(), wanted.dequantize(), rtol=3e-7, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own doing
@pytest.mark.parametrize(
    "operand",
    [
        Operand("current", "e4m3"),
        *(pytest.param(of, marks=pytest.mark.slow) for of in (Operand("current", "e5m2"), SQUARE, E4M3_LINES)),
    ],
    ids=str,
)
def test_what_is_compiled_on_a_gpu_has_the_same_bytes(operand, monkeypatch):
    """Here with the compiler for CPUs: nothing is divided in what it is given, and a cast rounds as torch's."""
    slot, x = Slot("a"), tensors(80, 272, 16)[0]
    eager = [prepare(t, operand, slot, "x") for t in (x, x.T)]
    monkeypatch.setattr(torch_native, "_fast", lambda function, x: torch_native._compiled(function))
    compiled = [prepare(t, operand, slot, "x") for t in (x, x.T)]
    for got, wanted in zip(compiled, eager, strict=True):
        assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
        assert got.codes.is_contiguous()
        assert torch.equal(*(of.scales[0] for of in (got, wanted)))


def _names(packed):
    return [getattr(F.ScalingType, way) for way in packed.ways], torch_native._swizzles(packed)


def test_two_numbers_of_four_bits_are_a_byte_the_first_in_its_lower_half():
    values = torch.tensor(fake_scaled_mm.E2M1).view(2, 8)
    assert two_a_byte(values).view(torch.uint8).tolist() == [
        [0x10, 0x32, 0x54, 0x76],
        [0x98, 0xBA, 0xDC, 0xFE],
    ]


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 6), (300, 33)])
def test_scales_lie_in_tiles_of_128_by_4(shape):
    """Against the rule, element by element; what is beyond the edge is zero."""
    scale = torch.randint(1, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    got = swizzled(scale)
    assert torch.equal(fake_scaled_mm.unswizzled(got, *shape), scale.float())
    assert got.float().count_nonzero() == scale.numel()


def test_operands_are_filled_up_with_zeros():
    x = torch.ones(5, 33)
    assert padded(x, 16).shape == (16, 48)
    assert padded(x, 16).sum() == x.sum()
    assert padded(torch.ones(16, 32), 16).shape == (16, 32)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(48, 64, 32), (37, 48, 80), (5, 20, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_cpu_multiplies_as_the_emulation_does(recipe, dtype, sizes, has_bias):
    """torch itself, in all three products: 1e-3 in bf16, whose last digit may turn over, and 1e-6 in fp32."""
    bias = torch.randn(sizes[2], generator=torch.Generator().manual_seed(1)) if has_bias else None
    got, wanted = both(RECIPES[recipe], *sizes, dtype, bias)
    for mine, reference in zip(got, wanted, strict=True):
        assert mine.dtype == reference.dtype
        assert reference.abs().max() > 0
        assert distance(mine, reference) < (1e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("recipe", NATIVE)
@pytest.mark.parametrize("sizes", [(64, 160, 288), (37, 144, 48)], ids=str)
def test_a_gpu_would_multiply_as_the_emulation_does(recipe, sizes, on_gpu):
    """With what a GPU asks of layouts: also where tokens and widths are no multiples, and with rounding at random."""
    got, wanted = both(RECIPES[recipe], *sizes)
    for mine, reference in zip(got, wanted, strict=True):
        assert mine.dtype == reference.dtype
        assert reference.abs().max() > 0
        assert distance(mine, reference) < 1e-3


def test_leading_dimensions_are_kept():
    x, w, dy = tensors(24, 64, 32)
    recipe = RECIPES["fp8_current"]
    flat = passes(NativeGemm(recipe, slot_for(recipe)), x, w, dy)
    deep = passes(NativeGemm(recipe, slot_for(recipe)), x.view(2, 3, 4, 64), w, dy.view(2, 3, 4, 32))
    assert deep[0].shape == (2, 3, 4, 32)
    assert all(torch.equal(one, other.view_as(one)) for one, other in zip(flat, deep, strict=True))


def test_products_that_are_not_quantized_are_plain():
    """Only the forward product is: gradients are those of the weights and inputs as they are."""
    recipe = replace(RECIPES["fp8_current"], name="forward", dgrad=Product(BF16, BF16), wgrad=Product(BF16, BF16))
    got, wanted = both(recipe, 48, 64, 32)
    for mine, reference in zip(got, wanted, strict=True):
        assert distance(mine, reference) < 1e-3
    x, w, dy = tensors(48, 64, 32)
    assert torch.equal(got[1], dy @ w.bfloat16())
    assert not torch.equal(got[0], x @ w.bfloat16().T)


def test_of_x_only_its_bytes_are_kept():
    """A byte for each number of x, beside the weight."""
    x, w, _ = tensors(48, 64, 32)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        NativeGemm(RECIPES["fp8_current"], slot_for(RECIPES["fp8_current"]))(x.requires_grad_(), w, None)
    assert {(t.dtype, t.numel()) for t in kept if t is not w} == {(torch.float8_e4m3fn, x.numel()), (torch.float32, 1)}


def test_a_weight_is_quantized_once_while_it_is_the_same(monkeypatch):
    recipe, counted = RECIPES["fp8_current"], []
    slot, (x, w, dy) = slot_for(recipe), tensors(48, 64, 32)
    gemm, quantized = NativeGemm(recipe, slot), torch_native.prepare

    def counting(t, operand, slot, which, random=None):
        counted.append(which)
        return quantized(t, operand, slot, which, random)

    monkeypatch.setattr(torch_native, "prepare", counting)
    for _ in range(3):
        passes_with(gemm, x, w, dy)
    assert counted.count("w") == 1
    assert counted.count("x") == counted.count("dy") == 3, "the bytes of x and dy serve two products"
    with torch.no_grad():
        w.mul_(2)
    passes_with(gemm, x, w, dy)
    slot.clock.weights_changed()
    passes_with(gemm, x, w, dy)
    assert counted.count("w") == 3


def passes_with(gemm, x, w, dy):
    """`passes` with the very same weight."""
    gemm(x.clone().requires_grad_(), w.requires_grad_(), None).backward(dy)


def test_the_largest_of_all_parts_gives_the_scale():
    """Of x, W and dy; here other ranks hold numbers three times as large, which a scale must leave room for."""
    recipe, (x, w, dy) = RECIPES["fp8_current"], tensors(48, 64, 32)
    parts = {which: lambda amax: amax * 3 for which in ("x", "w", "dy")}
    got, wanted = (passes(kind(recipe, Slot("a", parts=parts)), x, w, dy) for kind in (NativeGemm, EmulatedGemm))
    alone = passes(NativeGemm(recipe, Slot("a")), x, w, dy)
    for mine, reference, other in zip(got, wanted, alone, strict=True):
        assert distance(mine, reference) < 1e-3
        assert not torch.equal(mine, other)


def test_health_sees_what_is_multiplied():
    recipe, (x, w, dy) = RECIPES["fp8_current"], tensors(48, 64, 32)
    seen = []
    for kind in (NativeGemm, EmulatedGemm):
        health = Health()
        passes(kind(recipe, Slot("a", clock=Clock(watch=health))), x, w, dy)
        seen.append(health.figures())
    assert seen[0].keys() == seen[1].keys()
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_graph_holds_the_product_in_every_step():
    """torch.compile breaks at nothing, gives the same, and is asked once."""
    recipe, (x, w, dy) = RECIPES["fp8_current"], tensors(48, 64, 32)
    eager, slot, graphs = passes(NativeGemm(recipe, slot_for(recipe)), x, w, dy), slot_for(recipe), []

    def counting(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        NativeGemm(recipe, slot).__call__, fullgraph=True, backend=aot_autograd(fw_compiler=counting)
    )
    for slot.clock.step in range(3):
        assert all(torch.equal(a, b) for a, b in zip(passes(compiled, x, w, dy), eager, strict=True))
        slot.clock.weights_changed()
    assert len(graphs) == 2, "one forward, one backward"


def test_an_older_torch_multiplies_by_its_older_function(monkeypatch):
    monkeypatch.delattr(F, "scaled_mm")
    got, wanted = both(RECIPES["fp8_current"], 48, 64, 32)
    assert all(distance(mine, reference) < 1e-3 for mine, reference in zip(got, wanted, strict=True))
    assert torch_obstacles.obstacle(RECIPES["fp8_current"], CPU) is None
    assert "no scaled_mm for BlockWise1x128" in torch_obstacles.obstacle(RECIPES["fp8_block"], CPU)


# --- where it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch, on_gpu):
    """`device(capability, cuda)`: a machine with such a GPU, which multiplies what it is asked to."""
    torch_obstacles._refusal.cache_clear()
    small = torch_obstacles._small_product
    monkeypatch.setattr(torch_obstacles, "_small_product", lambda of, _: small(of, CPU))

    def machine(capability, cuda="13.0"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return torch.device("cuda")

    yield machine
    torch_obstacles._refusal.cache_clear()


ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)


@pytest.mark.parametrize(
    "recipe, capability, cuda, says",
    [
        ("fp8_current", (8, 0), "13.0", "FP8 from compute capability 8.9 on (Ada, Hopper), it has 8.0"),
        ("fp8_current", ADA, "12.4", None),
        ("fp8_delayed", HOPPER, "12.4", None),
        ("fp8_block", HOPPER, "12.9", None),
        ("fp8_block", HOPPER, "12.8", "and CUDA 12.9 or newer, and was built for CUDA 12.8"),
        (
            "fp8_block",
            BLACKWELL,
            "13.0",
            "torch multiplies blocks of 128 with compute capability 9.0 (Hopper) and CUDA 12.9 or newer, it has 10.0",
        ),
        ("mxfp8", HOPPER, "13.0", "MXFP8 from compute capability 10.0 on (Blackwell), it has 9.0"),
        ("mxfp8", BLACKWELL, "13.0", None),
        ("nvfp4", HOPPER, "13.0", "NVFP4 from compute capability 10.0 on (Blackwell), it has 9.0"),
        ("nvfp4", BLACKWELL, "13.0", None),
        ("mor", BLACKWELL, "13.0", "torch has no product for operands of mor"),
    ],
)
def test_each_machine_says_what_it_cannot_and_what_could(recipe, capability, cuda, says, device):
    found = torch_obstacles.obstacle(RECIPES[recipe], device(capability, cuda))
    assert found == says if says is None else says in found


def test_no_version_is_believed_where_torch_refuses(device, monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling\nand so on")

    hopper = device(HOPPER)
    monkeypatch.setattr(F, "scaled_mm", refuses)
    found = torch_obstacles.obstacle(RECIPES["fp8_block"], hopper)
    assert found == f"torch {torch.__version__} refuses: CUBLAS_STATUS_NOT_SUPPORTED when calling"


def test_a_torch_that_makes_no_numbers_is_found_out(device, monkeypatch):
    hopper = device(HOPPER)
    monkeypatch.setattr(F, "scaled_mm", lambda *args, **kwargs: fake_scaled_mm.scaled_mm(*args, **kwargs) * torch.nan)
    assert "wrongly" in torch_obstacles.obstacle(RECIPES["fp8_current"], hopper)


@pytest.mark.parametrize("recipe, capability", [("fp8_block", HOPPER), ("mxfp8", BLACKWELL), ("nvfp4", BLACKWELL)])
def test_a_torch_that_reads_scales_in_another_order_is_found_out(recipe, capability, device, monkeypatch):
    def wrong(a, b, scale_a, *args, **kwargs):
        scale = scale_a[0].clone()
        bytes_, moved = (
            (scale, scale_a[0]) if scale.element_size() > 1 else (scale.view(torch.uint8), scale_a[0].view(torch.uint8))
        )
        bytes_.copy_(moved.roll(4, 0))
        return fake_scaled_mm.scaled_mm(a, b, [scale, *scale_a[1:]], *args, **kwargs)

    gpu = device(capability)
    monkeypatch.setattr(F, "scaled_mm", wrong)
    assert "wrongly" in torch_obstacles.obstacle(RECIPES[recipe], gpu)


@pytest.mark.parametrize(
    "product, says",
    [
        (Product(E5M2, E5M2), "E5M2 with E5M2"),
        (Product(E5M2, BF16), "a quantized operand and one that is not"),
        (Product(SQUARE, SQUARE), "BlockWise128x128 and BlockWise128x128"),
        (Product(Operand("mx", "e4m3"), Operand("current", "e4m3")), "BlockWise1x32 and TensorWise"),
    ],
)
def test_products_that_no_hardware_has_are_refused(product, says):
    assert says in torch_obstacles.obstacle(GemmRecipe("own", product, product, product), CPU)
