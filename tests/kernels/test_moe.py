from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels.activation import squared_relu as ours
from nemohybrid_kernels.activation import swiglu
from nemohybrid_kernels.errors import BackendError
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.moe.grouped import expert_mlp_grouped
from nemohybrid_kernels.moe.products import GROUPED_MM, SEGMENTS, Products, obstacle, products_for, usual_height
from nemohybrid_kernels.moe.reference import expert_mlp_torch
from nemohybrid_kernels.moe.visits import sort_by_expert

IMPLEMENTATIONS = {
    "loop": expert_mlp_torch,
    "segments": partial(expert_mlp_grouped, products=SEGMENTS),
    "grouped_mm": partial(expert_mlp_grouped, products=GROUPED_MM),
}
ANY_TYPE = ["loop", "segments"]
"""On the CPU torch's grouped_mm takes fp32 and bf16, in widths of 16 bytes."""
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Tolerance of the largest entry of the float64 oracle's tensor."""


def squared_relu(h):
    return F.relu(h).square()


def gated_silu(h):
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


def moe_inputs(T=13, D=8, E=5, width=6, K=2, dtype=torch.float64, gated=False, seed=0):
    """Random experts; the last is never chosen where there is another."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    choices = torch.rand(T, max(E - 1, K), generator=g, dtype=torch.float64)
    weights = torch.rand(T, K, generator=g, dtype=torch.float64)
    return {
        "x": normal(T, D).to(dtype),
        "expert_ids": choices.argsort(-1)[:, :K],
        "expert_weights": weights if dtype == torch.float64 else weights.float(),
        "up": normal(E, (2 if gated else 1) * width, D).to(dtype),
        "down": normal(E, D, width).to(dtype),
    }


def moe_oracle(x, expert_ids, expert_weights, up, down, activation):
    """Every expert on every token, weighted by what the router gave it."""
    chosen = F.one_hot(expert_ids, len(up)).to(expert_weights.dtype)
    weight_TE = (chosen * expert_weights.unsqueeze(-1)).sum(1)
    hidden = activation(torch.einsum("td,efd->tef", x, up)) * weight_TE.unsqueeze(-1)
    return (torch.einsum("tef,edf->td", hidden, down),)


def both(inputs, activation, results_and_gradients, run=expert_mlp):
    got = results_and_gradients(lambda **i: (run(**i, activation=activation),), inputs)
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return got, results_and_gradients(lambda **i: moe_oracle(**i, activation=activation), doubles)


@pytest.mark.parametrize("activation", [squared_relu, gated_silu])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "run, dtype",
    [(run, dtype) for run in ANY_TYPE for dtype in DTYPES]
    + [("grouped_mm", torch.float32), ("grouped_mm", torch.bfloat16)],
    ids=str,
)
def test_values_and_all_gradients_equal_the_dense_oracle(run, dtype, K, activation, assert_same, results_and_gradients):
    inputs = moe_inputs(width=8, K=K, dtype=dtype, gated=activation is gated_silu)
    got, want = both(inputs, activation, results_and_gradients, IMPLEMENTATIONS[run])
    assert got["out0"].dtype == dtype
    assert_same(got, want, DTYPES[dtype])


@pytest.mark.parametrize("run", ANY_TYPE)
def test_any_shape_equals_the_dense_oracle(run, assert_same, results_and_gradients):
    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(T=st.integers(0, 9), E=st.integers(1, 6), K=st.integers(1, 6), D=st.integers(1, 5))
    def check(T, E, K, D):
        inputs = moe_inputs(T, D, E, K=min(K, E))
        assert_same(*both(inputs, squared_relu, results_and_gradients, IMPLEMENTATIONS[run]), 1e-12)

    check()


@pytest.mark.parametrize(
    "run, dtype", [("segments", torch.float64), ("segments", torch.bfloat16), ("loop", torch.float64)]
)
@pytest.mark.parametrize("loads", [[70, 0, 0], [0, 0, 70], [33, 0, 37], [1, 68, 1], [0, 0, 0]], ids=str)
def test_any_loads_equal_the_dense_oracle(loads, run, dtype, assert_same, results_and_gradients):
    """In bf16 the CPU multiplies a few rows more than an expert has: here of a neighbour, and beyond the last."""
    ids = torch.arange(3).repeat_interleave(torch.tensor(loads))
    inputs = moe_inputs(T=len(ids), E=3, K=1, dtype=dtype)
    inputs["expert_ids"] = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]
    got, want = both(inputs, squared_relu, results_and_gradients, IMPLEMENTATIONS[run])
    assert_same(got, want, DTYPES[dtype])
    for expert, load in enumerate(loads):
        assert load or not got["d_up"][expert].any(), f"expert {expert} learns without a token"


def test_fp32_matrices_are_cast_to_the_type_of_the_rows(assert_same, results_and_gradients):
    rounded = moe_inputs(dtype=torch.bfloat16)
    masters = rounded | {name: rounded[name].float() for name in ("up", "down")}
    run = partial(expert_mlp, activation=squared_relu)
    got, want = (results_and_gradients(lambda **i: (run(**i),), inputs) for inputs in (masters, rounded))
    assert got["out0"].dtype == torch.bfloat16
    assert got["d_up"].dtype == torch.float32
    assert_same(got, want, 0.0)


@pytest.mark.parametrize("run", ANY_TYPE)
def test_weights_are_not_rounded_before_they_act(run):
    """1.9921875 x 1.0035 is 1.999: 2 in bf16. With the weight rounded first it would stay what it was."""
    one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    x, ids, weights = one[0] * 1.9921875, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 1.0035)
    assert IMPLEMENTATIONS[run](x, ids, weights, one, one, activation=lambda h: h).item() == 2


def test_what_grouped_mm_leaves_of_empty_experts_is_thrown_away(monkeypatch, assert_same, results_and_gradients):
    def with_rubbish(left, right, offs):
        product = grouped_mm(left, right, offs=offs)
        if product.dim() == 3:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return product

    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", with_rubbish)
    inputs = moe_inputs(dtype=torch.float32, width=8)
    got, want = both(inputs, squared_relu, results_and_gradients, IMPLEMENTATIONS["grouped_mm"])
    assert_same(got, want, DTYPES[torch.float32])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_experts_without_tokens_get_zero_gradients(run, results_and_gradients):
    inputs = moe_inputs(width=8, dtype=torch.float32)
    got = results_and_gradients(lambda **i: (IMPLEMENTATIONS[run](**i, activation=squared_relu),), inputs)
    for name in ("d_up", "d_down"):
        assert got[name][:-1].abs().amax((1, 2)).min() > 0, f"{name}: an expert that worked learns nothing"
        assert got[name][-1].abs().max() == 0, f"{name}: an expert that did nothing learns"


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_no_tokens_at_all_give_zero_gradients_for_every_parameter(run, results_and_gradients):
    inputs = moe_inputs(T=0, width=8, dtype=torch.float32)
    got = results_and_gradients(lambda **i: (IMPLEMENTATIONS[run](**i, activation=squared_relu),), inputs)
    assert got["out0"].shape == (0, 8)
    for name in ("d_up", "d_down"):
        assert got[name].abs().max() == 0, f"{name} is not zero without tokens"


@pytest.mark.parametrize("run", ANY_TYPE)
def test_the_handwritten_backward_passes_gradcheck(run):
    inputs = moe_inputs(T=4, D=3, E=3, width=2)
    ids = inputs.pop("expert_ids")
    tensors = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda x, w, up, down: IMPLEMENTATIONS[run](x, ids, w, up, down, activation=lambda h: F.silu(h) * h), tensors
    )


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_two_runs_are_equal_bit_by_bit(run, results_and_gradients):
    inputs = moe_inputs(T=200, D=32, E=8, width=16, K=4, dtype=torch.bfloat16)
    first, second = (
        results_and_gradients(lambda **i: (IMPLEMENTATIONS[run](**i, activation=squared_relu),), inputs)
        for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


def with_rubbish_at_nobody(products):
    """Rows of nobody hold what the memory held before: here what spoils every sum it enters."""

    def rows(left, matrices, visits):
        out = products.rows(left, matrices, visits)
        out[visits.ends[-1] :] = torch.nan
        return out

    return Products(rows, products.matrices)


WITH_RUBBISH = {
    "loop": expert_mlp_torch,
    "segments": partial(expert_mlp_grouped, products=with_rubbish_at_nobody(SEGMENTS)),
    "grouped_mm": partial(expert_mlp_grouped, products=with_rubbish_at_nobody(GROUPED_MM)),
}


@pytest.mark.parametrize("activation", [squared_relu, gated_silu])
@pytest.mark.parametrize(
    "run, dtype",
    [(run, dtype) for run in ANY_TYPE for dtype in DTYPES] + [("grouped_mm", torch.float32)],
    ids=str,
)
def test_visits_to_nobody_add_nothing_and_get_no_gradient(run, dtype, activation, assert_same, results_and_gradients):
    """As if their weight were zero; the tokens that visit nobody at all hold no numbers."""
    E, K = 5, 3
    inputs = moe_inputs(T=40, E=E, width=8, K=K, dtype=dtype, gated=activation is gated_silu)
    nobody = torch.rand(40, K, generator=torch.Generator().manual_seed(1)) < 0.5
    nobody[:7], nobody[7] = True, False
    oracle = inputs | {"expert_weights": inputs["expert_weights"].masked_fill(nobody, 0)}
    _, want = both(oracle, activation, results_and_gradients, WITH_RUBBISH[run])
    want["d_expert_weights"] = want["d_expert_weights"].masked_fill(nobody, 0)
    inputs["expert_ids"] = inputs["expert_ids"].masked_fill(nobody, E)
    inputs["x"][:7] = torch.nan
    got = results_and_gradients(lambda **i: (WITH_RUBBISH[run](**i, activation=activation, absent=True),), inputs)
    assert_same(got, want, DTYPES[dtype])
    for name in ("out0", "d_x"):
        assert not got[name][:7].any(), name
    assert not got["d_expert_weights"][nobody].any()


@pytest.mark.parametrize("run", WITH_RUBBISH)
def test_experts_whom_nobody_visits_at_all_get_zero_gradients(run, results_and_gradients):
    inputs = moe_inputs(width=8, dtype=torch.float32)
    inputs["expert_ids"].fill_(5)
    got = results_and_gradients(lambda **i: (WITH_RUBBISH[run](**i, activation=squared_relu, absent=True),), inputs)
    assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_where_nobody_is_absent_the_bits_are_the_same(run, results_and_gradients):
    inputs = moe_inputs(T=60, width=8, dtype=torch.float32, K=3)
    plain, asked = (
        results_and_gradients(
            lambda absent=absent, **i: (IMPLEMENTATIONS[run](**i, activation=squared_relu, absent=absent),), inputs
        )
        for absent in (False, True)
    )
    for name, tensor in plain.items():
        assert torch.equal(tensor, asked[name]), name


def test_visits_are_sorted_by_expert_then_token_and_none_is_lost():
    visits = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), experts=5)
    assert visits.order.tolist() == [1, 2, 0, 4, 3, 5], "visit t * K + k of token t"
    assert visits.tokens.tolist() == [0, 1, 0, 2, 1, 2]
    assert visits.place[visits.order].tolist() == [0, 1, 2, 3, 4, 5]
    assert visits.ends.tolist() == [2, 2, 4, 6, 6]
    assert visits.counts == [2, 0, 2, 2, 0]


def test_the_grouped_path_never_waits_for_the_host():
    """A meta tensor has no values: whatever asks for one raises, as it would stall a GPU."""
    inputs = moe_inputs(T=64, D=16, width=24, dtype=torch.bfloat16)
    leaves = {k: v.to("meta").requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    y = expert_mlp(**leaves, activation=squared_relu, backend="grouped", absent=True)
    y.backward(torch.empty_like(y))
    assert all(leaf.grad is not None for leaf in leaves.values() if leaf.requires_grad)
    with pytest.raises(RuntimeError, match="meta"):
        expert_mlp(**leaves, activation=squared_relu, backend="torch")


@pytest.mark.parametrize("run", ["segments", "grouped_mm"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_what_is_kept_for_the_backward_is_as_documented(run, gated):
    """docs/moe.md: per visit the output of `up` in the type of the rows, a weight and two places; per token its row."""
    T, D, E, width, K = 13, 8, 5, 8, 2
    inputs = moe_inputs(T, D, E, width, K, dtype=torch.float32, gated=gated)
    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    matrices = {leaves[name].data_ptr() for name in ("up", "down")}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        IMPLEMENTATIONS[run](**leaves, activation=gated_silu if gated else squared_relu)
    size = sum(nbytes for pointer, nbytes in kept.items() if pointer not in matrices)
    assert size == T * D * 4 + T * K * ((2 if gated else 1) * width * 4 + 4 + 16) + 4 * E


@pytest.mark.parametrize(
    "dtype, widths, capability, reason",
    [
        (torch.float32, (64, 64), (9, 0), "multiplies bfloat16 there, the experts compute in float32"),
        (torch.bfloat16, (64, 36), (9, 0), "multiples of 8; 36 is none"),
        (torch.bfloat16, (64, 64), (8, 0), "compute capability 9.0, it has 8.0"),
        (torch.bfloat16, (64, 64), (10, 0), None),
    ],
)
def test_what_keeps_grouped_mm_from_a_gpu_is_named(dtype, widths, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = obstacle(dtype, widths, torch.device("cuda"))
    assert found is None if reason is None else reason in (found or "")


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match=r"no backend 'fast'. Legal: 'auto', 'triton', 'grouped', 'torch'"):
        expert_mlp(**moe_inputs(), activation=squared_relu, backend="fast")


def test_bf16_products_have_few_heights_and_little_surplus():
    heights = {usual_height(rows, torch.bfloat16) for rows in range(1, 4097)}
    assert len(heights) < 100, "each is compiled once"
    for rows in range(1, 4097):
        assert rows <= usual_height(rows, torch.bfloat16) <= max(rows * 17 / 16, rows + 31)
    assert usual_height(77, torch.float32) == 77


def test_the_products_are_those_that_can_run_and_are_fast():
    cpu, gpu, wide, odd = torch.device("cpu"), torch.device("cuda"), (64, 32), (64, 33)
    assert products_for(torch.float32, wide, cpu) is GROUPED_MM
    for dtype, widths in ((torch.float32, odd), (torch.float64, wide), (torch.bfloat16, wide)):
        assert products_for(dtype, widths, cpu) is SEGMENTS, f"{dtype}, {widths}"
    assert products_for(torch.bfloat16, wide, gpu) is GROUPED_MM


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [ours, swiglu, gated_silu])
@pytest.mark.parametrize("absent", [False, True])
def test_grouped_experts_in_a_graph_equal_the_oracle(activation, dtype, absent, assert_same, results_and_gradients):
    """Derivatives of the activations that a model offers are formulas there; any other is differentiated."""
    inputs = moe_inputs(width=16, dtype=dtype, gated=activation is not ours)
    torch.compiler.reset()

    @partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=False)
    def run(**i):
        return expert_mlp_grouped(**i, activation=activation, absent=absent)

    assert_same(*both(inputs, activation, results_and_gradients, lambda activation, **i: run(**i)), DTYPES[dtype])
