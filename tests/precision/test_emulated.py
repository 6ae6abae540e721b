"""Products by a recipe: what is quantized along which dimension, with which numbers, and what stays the same."""

import math
from dataclasses import replace

import pytest
import torch

from nemohybrid.precision import numerics
from nemohybrid.precision.backends.emulated import EmulatedGemm
from nemohybrid.precision.backends.emulated_experts import expert_products
from nemohybrid.precision.backends.torch_native import NativeGemm
from nemohybrid.precision.clock import Clock
from nemohybrid.precision.delayed import DelayedScales, step_all
from nemohybrid.precision.gemm import plain_gemm
from nemohybrid.precision.health import Health
from nemohybrid.precision.mor import by_block, by_tensor, quantize_by_group
from nemohybrid.precision.recipe import RECIPES, GemmRecipe
from nemohybrid.precision.slot import Slot
from nemohybrid_kernels.activation import squared_relu_torch
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.moe.products import Pair

T, IN, OUT = 48, 64, 32
STATELESS = [name for name, recipe in RECIPES.items() if recipe.is_quantized and not recipe.is_delayed]


def tensors(dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(T, IN, generator=g).to(dtype), torch.randn(T, OUT, generator=g).to(dtype)
    return x, torch.randn(OUT, IN, generator=g) / 8, dy


def passes(gemm, x, weight, dy, bias=None):
    """y, dx, dW (and dbias)."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    y = gemm(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def emulated(recipe, **slot):
    return EmulatedGemm(RECIPES[recipe], Slot("layers.0.mixer.fc1", **slot))


def distance(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(
    "recipe, quantize",
    [
        ("fp8_current", lambda t, what: numerics.quantize_fp8_current(t, "e5m2" if what == "dy" else "e4m3")),
        ("fp8_block", lambda t, what: numerics.quantize_fp8_block(t, "e4m3", 128 if what == "w" else 1)),
        ("mxfp8", lambda t, what: numerics.quantize_mxfp8(t)),
        ("nvfp4_no_sr", lambda t, what: numerics.quantize_nvfp4(t, "16x16" if what == "w" else "1x16")),
    ],
)
def test_each_operand_is_quantized_along_what_its_product_sums_over(recipe, quantize):
    """Against float64 products of what the numerics give; dW of NVFP4 is transformed as well."""
    x, w, dy = tensors()

    def q(t, what, hadamard=False):
        t = t.contiguous()
        if hadamard:
            return numerics.quantize_nvfp4(t, hadamard=True).dequantize().double()
        return quantize(t, what).dequantize().double()

    mixed = recipe.startswith("nvfp4")
    weight = w.bfloat16()
    wanted = [
        q(x, "x") @ q(weight, "w").T,
        q(dy, "dy") @ q(weight.T, "w").T,
        q(dy.T, "dy", mixed) @ q(x.T, "x", mixed).T,
    ]
    for got, exact in zip(passes(emulated(recipe), x, w, dy), wanted, strict=True):
        rounded = 2**-8 if got.dtype == torch.bfloat16 else 1e-6
        assert distance(got, exact) < rounded


@pytest.mark.parametrize("recipe", STATELESS)
def test_a_product_is_near_the_plain_one_and_not_equal(recipe):
    x, w, dy = tensors()
    bias = torch.randn(OUT)
    plain, got = passes(plain_gemm, x, w, dy, bias), passes(emulated(recipe), x, w, dy, bias)
    most = 0.25 if recipe.startswith("nvfp4") else 0.08
    for one, other in zip(got[:3], plain[:3], strict=True):
        assert one.dtype == other.dtype
        assert 1e-3 < distance(one, other) < most
    assert torch.equal(got[3], plain[3]), "nobody quantizes a bias"


@pytest.mark.parametrize("shape", [(2, 3, IN), (IN,), (0, IN)])
def test_any_shape_of_rows(shape):
    x = torch.randn(shape, requires_grad=True)
    y = emulated("nvfp4")(x, torch.randn(OUT, IN, requires_grad=True), None)
    y.sum().backward()
    assert y.shape == (*shape[:-1], OUT)
    assert x.grad.shape == x.shape


def test_random_bits_are_those_of_seed_layer_step_microbatch_and_rank():
    x, w, dy = tensors()

    def gradients(name="a", **clock):
        gemm = EmulatedGemm(RECIPES["nvfp4"], Slot(name, clock=Clock(**clock)))
        return passes(gemm, x, w, dy)

    first = gradients(seed=1, step=5)
    for one, other in zip(first, gradients(seed=1, step=5), strict=True):
        assert torch.equal(one, other), "the same place, the same bits"
    for change in ({"seed": 2}, {"step": 6}, {"microbatch": 1}, {"rank": 1}, {"name": "b"}):
        other = gradients(**{"seed": 1, "step": 5} | change)
        assert torch.equal(other[0], first[0]), "the forward pass rounds to nearest"
        assert not torch.equal(other[1], first[1]), change


def test_the_backward_pass_draws_for_the_microbatch_of_its_forward_pass():
    """In a pipeline others come in between."""
    x, w, dy = tensors()
    clock = Clock(microbatch=3)
    gemm = EmulatedGemm(RECIPES["nvfp4"], Slot("a", clock=clock))
    wanted = passes(gemm, x, w, dy)[1]
    leaf = x.clone().requires_grad_()
    y = gemm(leaf, w, None)
    clock.microbatch = 9
    y.backward(dy)
    assert torch.equal(leaf.grad, wanted)


def test_weights_are_quantized_once_until_they_change(monkeypatch):
    quantized = []
    real = numerics.quantize_nvfp4

    def counting(x, block="1x16", *rest, **how):
        quantized.append(block)
        return real(x, block, *rest, **how)

    monkeypatch.setattr(numerics, "quantize_nvfp4", counting)
    clock = Clock()
    x, w, dy = tensors()
    w.requires_grad_()
    gemm = EmulatedGemm(RECIPES["nvfp4"], Slot("a", clock=clock))
    for _ in range(3):
        gemm(x.clone().requires_grad_(), w, None).backward(dy)
    assert quantized.count("16x16") == 1, "the transpose has the same numbers"
    clock.weights_changed()
    gemm(x, w, None)
    assert quantized.count("16x16") == 2
    with torch.no_grad():
        w.mul_(2)
    assert distance(gemm(x, w, None), plain_gemm(x, w, None)) < 0.3, "a weight that was written to is seen"


@pytest.mark.parametrize("kind", [EmulatedGemm, NativeGemm])
def test_a_weight_that_is_there_for_a_while_leaves_nothing(kind):
    """With FSDP each rank would else hold all weights, quantized. Products are those of a weight that stays."""
    x, w, dy = tensors()
    fleeting, staying = (kind(RECIPES["fp8_current"], Slot("a", keeps=keeps)) for keeps in (False, True))
    for one, other in zip(passes(fleeting, x, w, dy), passes(staying, x, w, dy), strict=True):
        assert torch.equal(one, other)
    assert staying._weights
    assert not fleeting._weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own doing
@pytest.mark.parametrize("recipe", ["fp8_current", "nvfp4"])
def test_a_graph_gives_the_same_and_draws_anew_in_every_step(recipe):
    x, w, dy = tensors()
    eager, slot = EmulatedGemm(RECIPES[recipe], Slot("a", clock=Clock())), Slot("a", clock=Clock())
    compiled = torch.compile(EmulatedGemm(RECIPES[recipe], slot).__call__, fullgraph=True, backend="aot_eager")
    gradients = []
    for slot.clock.step in range(3):
        eager.slot.clock.step = slot.clock.step
        got = passes(compiled, x, w, dy)
        assert all(torch.equal(one, other) for one, other in zip(got, passes(eager, x, w, dy), strict=True))
        gradients.append(got[1])
    assert torch.equal(gradients[0], gradients[2]) == (recipe == "fp8_current")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_no_graph_holds_delayed_scaling():
    gemm = EmulatedGemm(RECIPES["fp8_delayed"], Slot("a", scales=DelayedScales(("e4m3", "e4m3", "e5m2"))))
    compiled = torch.compile(gemm.__call__, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="delayed scaling remembers what it sees"):
        compiled(torch.ones(16, 16), torch.ones(16, 16, requires_grad=True), None)


@pytest.mark.parametrize("kind", [EmulatedGemm, NativeGemm])
@pytest.mark.parametrize("leaf", ["x", "weight", "bias"])
def test_each_gradient_is_the_same_where_no_other_is_asked_for(kind, leaf):
    x, w, dy = tensors()
    gemm, bias = kind(RECIPES["fp8_current"], Slot("a")), torch.randn(OUT)
    wanted = dict(zip(("x", "weight", "bias"), passes(gemm, x, w, dy, bias)[1:], strict=True))
    given = {"x": x.clone(), "weight": w.clone(), "bias": bias.clone()}
    given[leaf].requires_grad_()
    gemm(**given).backward(dy)
    assert {name: t.grad is not None for name, t in given.items()} == {name: name == leaf for name in given}
    assert torch.equal(given[leaf].grad, wanted[leaf])


def test_parts_of_ranks_are_scaled_by_the_largest_of_all():
    """Two ranks that share the inputs of a layer: their summands add up to the product of one."""
    x, w, _ = tensors(torch.float32)
    x[0, -1], w[1, 0] = 50.0, 9.0
    whole = emulated("fp8_current")(x, w, None)
    amax = {"x": lambda own: x.abs().amax().view(1), "w": lambda own: w.abs().amax().view(1)}
    halves = [
        emulated("fp8_current", parts=amax)(a, b, None) for a, b in zip(x.chunk(2, 1), w.chunk(2, 1), strict=True)
    ]
    torch.testing.assert_close(sum(halves), whole)
    alone = [emulated("fp8_current")(a, b, None) for a, b in zip(x.chunk(2, 1), w.chunk(2, 1), strict=True)]
    assert not torch.allclose(sum(alone), whole)


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8_current", "mxfp8", "nvfp4_no_sr", "mor"])
def test_experts_are_layers_of_their_own(recipe):
    """Each as the same recipe makes of a layer that has its rows alone. One of them has none."""
    E, F, D = 3, 32, 64
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=g)
    up, down = torch.randn(E, F, D, generator=g) / 8, torch.randn(E, D, F, generator=g) / 6
    ids, weights = torch.randint(2, (T, 1), generator=g), torch.rand(T, 1, generator=g)
    dy = torch.randn(T, D, generator=g)
    slot = Slot("layers.1.mixer.experts", "expert")
    pair = Pair(
        *(expert_products(RECIPES[recipe], replace(slot, name=f"{slot.name}.{name}")) for name in ("up", "down"))
    )

    def grouped(*leaves):
        return expert_mlp(
            leaves[0], ids, weights, *leaves[1:], activation=squared_relu_torch, multiply=pair, backend="grouped"
        )

    def apart(x, up, down):
        out = torch.zeros(T, D)
        for expert in range(E):
            rows = (ids[:, 0] == expert).nonzero()[:, 0]
            if len(rows):
                hidden = squared_relu_torch(emulated(recipe)(x[rows], up[expert], None)) * weights[rows]
                out = out.index_add(0, rows, emulated(recipe)(hidden, down[expert], None))
        return out

    results = []
    for run in (grouped, apart):
        leaves = [t.clone().requires_grad_() for t in (x, up, down)]
        y = run(*leaves)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- delayed scaling --------------------------------------------------------------------------------------------------


def test_delayed_scales_follow_what_was_largest():
    """The first step has a scale of 1; then that of the largest of the last `length` steps, by all microbatches of a step."""
    state = DelayedScales(("e4m3", "e4m3", "e5m2"), length=2)
    for step, largest in enumerate([4.0, 2.0, 1.0, 8.0]):
        for part in (largest / 2, -largest):
            state.scale_of("x", torch.tensor([[part, 0.1]]))
        step_all([state])
        window = [4.0, 2.0, 1.0, 8.0][max(0, step - 1) : step + 1]
        assert state.scale[0] == torch.tensor(448.0) / max(window)
    assert state.scale[1:].tolist() == [1.0, 1.0], "nothing was seen of the others"
    state.scale_of("x", torch.tensor([[float("inf")]]))
    before = state.scale.clone()
    step_all([state])
    assert torch.equal(state.scale, before)


def test_delayed_scaling_trains_and_ranks_agree():
    x, w, dy = tensors()
    states = [DelayedScales(("e4m3", "e4m3", "e5m2"), length=4) for _ in range(2)]
    gemms = [EmulatedGemm(RECIPES["fp8_delayed"], Slot("a", scales=state)) for state in states]
    for gemm, factor in zip(gemms, (1, 3), strict=True):
        passes(gemm, x * factor, w, dy)
    step_all(states, lambda seen: seen.amax(0, keepdim=True).expand_as(seen))
    assert torch.equal(states[0].scale, states[1].scale)
    assert states[0].scale[0] == torch.tensor(448.0) / (x * 3).abs().max().float()
    got = passes(gemms[0], x, w, dy)
    for one, other in zip(got, passes(plain_gemm, x, w, dy), strict=True):
        assert distance(one, other) < 0.08


def test_what_evaluation_or_an_attempt_that_did_not_count_has_seen_is_forgotten():
    """Not of weights, which are the same, and are not looked at again where they stay quantized."""
    state = DelayedScales(("e4m3", "bf16", "bf16"), length=2)
    for which in ("x", "w", "dy"):
        state.scale_of(which, torch.full((2, 2), 3.0))
    state.forget()
    assert state.seen.tolist() == [0.0, 3.0, 0.0]


# --- mixture of representations ---------------------------------------------------------------------------------------


def test_a_block_of_a_group_never_overflows_and_has_the_mantissa_of_its_tensor():
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 384)
    of = quantize_by_group(x)
    assert of.values.abs().max() <= 448
    scales = of.scale.reciprocal()
    mantissa, _ = torch.frexp(scales)
    torch.testing.assert_close(mantissa, mantissa[:1, :1].expand_as(mantissa), rtol=1e-6, atol=0)
    largest = x.abs().unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3))
    assert (largest * scales > 448 / 4).all(), "of the range no more than two powers of two are left"


def test_a_tensor_is_fp8_where_it_is_near_enough():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    numbers, accepted = by_tensor(x, 0.045)
    assert accepted == 1
    assert not torch.equal(numbers, x)
    exact, refused = by_tensor(x, 0.001)
    assert refused == 0
    assert torch.equal(exact, x)
    assert by_tensor(torch.zeros(16, 16), 0.045)[1] == 1


def test_each_block_gets_the_representation_it_fits():
    g = torch.Generator().manual_seed(0)
    even = torch.randn(128, 128, generator=g).abs() + 0.5
    wide = torch.exp2(torch.linspace(-14, 12, 128 * 128)).view(128, 128)  # E4M3 has not the exponents
    wider = torch.exp2(torch.linspace(-60, 60, 128 * 128)).view(128, 128)
    for x, share in ((even, 1), (wide, 1), (wider, 0)):
        numbers, accepted = by_block(x)
        assert accepted == share
        assert torch.equal(numbers, x) == (share == 0)
    both, accepted = by_block(torch.cat([even, wider], 1))
    assert accepted == 0.5
    assert torch.equal(both[:, 128:], wider)


# --- health -----------------------------------------------------------------------------------------------------------


def test_health_tells_what_is_lost_and_names_what_broke():
    x = torch.ones(16, 32)
    x[0, :16] = 1e-9
    clock = Clock(watch=Health())
    gemm = EmulatedGemm(RECIPES["nvfp4"], Slot("layers.3.mixer.fc1", clock=clock))
    gemm(x, torch.randn(16, 32), None)
    figures = clock.watch.figures()
    assert figures["layers.3.mixer.fc1.x/underflow"] == 16 / 512
    assert figures["layers.3.mixer.fc1.x/saturated"] == 0
    assert figures["layers.3.mixer.fc1.w/error"] == pytest.approx(0.1, abs=0.05)
    assert clock.watch.broken() == []
    x[3, 3] = float("nan")
    gemm(x, torch.randn(16, 32), None)
    assert clock.watch.broken() == ["layers.3.mixer.fc1.x"]
    mixture = Clock(watch=Health())
    EmulatedGemm(RECIPES["mor"], Slot("a", clock=mixture))(torch.randn(8, 16), torch.randn(4, 16), None)
    assert mixture.watch.figures() == {"a.x/accepted": 1.0, "a.w/accepted": 1.0}


@pytest.mark.parametrize("recipe", ["fp8_block", "nvfp4", "mor", "mor_block"])
def test_health_takes_no_note_of_experts_without_rows(recipe):
    clock = Clock(watch=Health())
    passes(EmulatedGemm(RECIPES[recipe], Slot("a", clock=clock)), *tensors(torch.float32)[:2], tensors()[2].float())
    alone = clock.watch.figures()
    clock.watch = Health()
    pair = expert_products(RECIPES[recipe], Slot("a", clock=clock))
    x, w, dy = tensors(torch.float32)
    ids = torch.ones(T, 1, dtype=torch.int64)
    hidden = expert_mlp(
        x,
        ids,
        torch.ones(T, 1),
        torch.stack([w, w]).requires_grad_(),
        torch.stack([w.T, w.T]),
        activation=squared_relu_torch,
        multiply=Pair(pair, pair),
        backend="grouped",
    )
    hidden.backward(dy @ w)
    figures = clock.watch.figures()
    assert all(math.isfinite(value) for value in figures.values())
    assert {name.partition("/")[0] for name in figures} == {name.partition("/")[0] for name in alone}


def test_nothing_is_looked_at_in_steps_that_are_not_sampled():
    assert Clock().watch is None


def test_a_recipe_says_what_it_is():
    assert RECIPES["nvfp4"].is_stochastic
    assert not RECIPES["nvfp4_no_sr"].is_stochastic
    assert not GemmRecipe("bf16").is_quantized
    assert RECIPES["fp8_delayed"].is_delayed
    assert replace(RECIPES["nvfp4"].fprop.right, square=False).transposes is False
