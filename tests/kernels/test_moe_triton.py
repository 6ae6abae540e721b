"""The Triton kernels of the experts and of squared ReLU: on a GPU where there is one, interpreted on the CPU elsewhere.

They are held to float64: the dense form for the experts, PyTorch's own operations for each kernel.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from host_waits import nothing_waits
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels import launching
from nemohybrid_kernels.activation import squared_relu, squared_relu_torch
from nemohybrid_kernels.errors import BackendError
from nemohybrid_kernels.moe import backends, expert_mlp
from nemohybrid_kernels.moe.grouped import expert_mlp_grouped
from nemohybrid_kernels.moe.products import GROUPED_MM, SEGMENTS, Products
from nemohybrid_kernels.moe.visits import by_visit, sort_by_expert, sum_by_token

pytest.importorskip("triton")

from nemohybrid_kernels.activation import triton as relu2
from nemohybrid_kernels.moe import triton as moe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


def swiglu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moe_inputs(T=13, D=24, E=5, width=16, K=2, dtype=torch.float32, gated=False):
    """Random experts; the last is never chosen where there is another."""
    choices = torch.rand(T, max(E - 1, K), generator=torch.Generator().manual_seed(0))
    return {
        "x": normal(T, D, dtype=dtype, seed=1),
        "expert_ids": choices.argsort(-1)[:, :K],
        "expert_weights": normal(T, K, seed=2).sigmoid(),
        "up": normal(E, (2 if gated else 1) * width, D, seed=3),
        "down": normal(E, D, width, seed=4),
    }


def oracle(x, expert_ids, expert_weights, up, down, activation):
    """Every expert on every token, weighted by what the router gave it."""
    chosen = F.one_hot(expert_ids, len(up)).to(expert_weights.dtype)
    hidden = activation(torch.einsum("td,efd->tef", x, up)) * (chosen * expert_weights.unsqueeze(-1)).sum(1)[..., None]
    return (torch.einsum("tef,edf->td", hidden, down),)


def in_double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def experts(run=moe.expert_mlp_triton, **how):
    """On the device where kernels run; inputs and results are on the CPU."""

    def call(**inputs):
        return (run(**{name: value.to(DEVICE) for name, value in inputs.items()}, **how).cpu(),)

    return call


@DTYPES
@pytest.mark.parametrize("activation", [squared_relu, swiglu])
@pytest.mark.parametrize("K", [1, 3])
def test_values_and_all_gradients_equal_the_dense_oracle(
    K, activation, dtype, tolerance, assert_same, results_and_gradients
):
    inputs = moe_inputs(K=K, dtype=dtype, gated=activation is swiglu)
    got = results_and_gradients(experts(activation=activation), inputs)
    plain = squared_relu_torch if activation is squared_relu else activation
    want = results_and_gradients(partial(oracle, activation=plain), in_double(inputs))
    assert got["out0"].dtype == got["d_x"].dtype == dtype
    assert got["d_up"].dtype == got["d_expert_weights"].dtype == torch.float32
    assert_same(got, want, tolerance)


@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(T=st.integers(0, 9), E=st.integers(1, 6), K=st.integers(1, 6), D=st.integers(1, 5), width=st.integers(1, 9))
def test_any_shape_equals_the_dense_oracle(T, E, K, D, width, assert_same, results_and_gradients):
    inputs = moe_inputs(T, D, E, width, K=min(K, E))
    got = results_and_gradients(experts(activation=squared_relu, products=SEGMENTS), inputs)
    want = results_and_gradients(partial(oracle, activation=squared_relu_torch), in_double(inputs))
    assert_same(got, want, 2e-5)


def test_weights_with_gaps_in_memory_are_read_where_they_are(assert_same, results_and_gradients):
    """A column of more weights, and one weight for all: flattened, they are views."""
    inputs, run = moe_inputs(K=1), experts(activation=squared_relu)

    def column(expert_weights, **others):
        return run(expert_weights=torch.cat([expert_weights, -expert_weights], 1)[:, :1], **others)

    assert_same(results_and_gradients(column, inputs), results_and_gradients(run, inputs), 0.0)
    inputs = moe_inputs() | {"expert_weights": torch.full((1, 1), 0.5)}

    def everywhere(copy, expert_weights, **others):
        return run(expert_weights=copy(expert_weights.expand(13, 2)), **others)

    got, want = (
        results_and_gradients(lambda copy=copy, **given: everywhere(copy, **given), inputs)
        for copy in (lambda t: t, torch.Tensor.contiguous)
    )
    assert_same(got, want, 1e-6)


def with_rubbish_at_nobody(products):
    """Rows of nobody hold what the memory held before: here what spoils every sum it enters."""

    def rows(left, matrices, visits):
        out = products.rows(left, matrices, visits)
        out[visits.ends[-1] :] = torch.nan
        return out

    return Products(rows, products.matrices)


@pytest.mark.parametrize("activation", [squared_relu, swiglu])
@pytest.mark.parametrize("whole", [False, True], ids=["some", "nobody at all"])
def test_visits_to_nobody_add_nothing_and_get_no_gradient(whole, activation, assert_same, results_and_gradients):
    E, K = 5, 3
    inputs = moe_inputs(T=40, E=E, K=K, gated=activation is swiglu)
    nobody = torch.rand(40, K, generator=torch.Generator().manual_seed(1)) < (2.0 if whole else 0.5)
    nobody[:7] = True
    without = inputs | {"expert_weights": inputs["expert_weights"].masked_fill(nobody, 0)}
    plain = squared_relu_torch if activation is squared_relu else activation
    want = results_and_gradients(partial(oracle, activation=plain), in_double(without))
    want["d_expert_weights"] = want["d_expert_weights"].masked_fill(nobody, 0)
    inputs["expert_ids"] = inputs["expert_ids"].masked_fill(nobody, E)
    inputs["x"][:7] = torch.nan
    products = with_rubbish_at_nobody(SEGMENTS)
    got = results_and_gradients(experts(activation=activation, products=products, absent=True), inputs)
    assert_same(got, want, 2e-6)
    assert not got["d_expert_weights"][nobody].any()


def visits_of(T, K, E, absent=False):
    ids = torch.randint(E + absent, (T, K), generator=torch.Generator().manual_seed(5))
    return sort_by_expert(ids.to(DEVICE), E, absent)


@DTYPES
@pytest.mark.parametrize("D", [7, 64, 5000])
def test_rows_go_where_they_are_wanted_and_come_back_summed(D, dtype, tolerance):
    visits = visits_of(11, 3, 4, absent=True)
    x, rows = normal(11, D, dtype=dtype).to(DEVICE), normal(33, D, dtype=dtype, seed=1).to(DEVICE)
    used = int(visits.ends[-1])
    assert 0 < used < 33
    sent = moe.permute(x, visits.order, visits.end, 3)
    assert torch.equal(sent[:used], x[visits.tokens[:used]])
    rows[used:] = torch.nan
    summed = moe.unpermute(rows, visits.place, visits.end, 3)
    want = by_visit(rows.double(), visits).view(11, 3, D).sum(1)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 1e-6  # the interpreter cuts digits off; a GPU takes the nearest
    assert (summed - want).abs().max() <= want.abs().max() * rounding


def test_a_sum_of_rows_is_rounded_once():
    """1 + 2^-8 + 2^-8 is 1 + 2^-7 in bf16; rounded after each addition it would stay 1."""
    visits = visits_of(1, 3, 1)
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16, device=DEVICE)
    assert moe.unpermute(rows, visits.place, None, 3).item() == 1 + 2.0**-7


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 24), (9, 1856), (1, 5000), (0, 8)], ids=str)
def test_squared_relu_and_its_gradient_equal_float64(shape, dtype, tolerance, assert_same, results_and_gradients):
    def run(h):
        return (relu2.squared_relu_triton(h.to(DEVICE)).cpu(),)

    inputs = {"h": normal(*shape, dtype=dtype)}
    want = results_and_gradients(lambda h: (squared_relu_torch(h),), in_double(inputs))
    assert_same(results_and_gradients(run, inputs), want, tolerance)


def test_what_is_no_number_stays_visible():
    h = torch.tensor([[torch.nan, -1.0, torch.inf]], device=DEVICE)
    assert torch.equal(relu2.forward(h).isnan(), h.isnan())
    assert relu2.backward(torch.ones_like(h), h)[0, 0].isnan()


def test_parts_of_wider_rows_are_read_in_place(assert_same):
    wide, visits = normal(6, 40).to(DEVICE), visits_of(6, 2, 3)
    x, rows = wide[:, 3:27], normal(12, 40, seed=1).to(DEVICE)[:, 5:29]
    got = {
        "relu2": relu2.forward(x),
        "relu2 backward": relu2.backward(x.flip(0), x),
        "permute": moe.permute(x, visits.order, None, 2),
        "unpermute": moe.unpermute(rows, visits.place, None, 2),
        "expanded": moe.permute(x[:1, :1].expand(6, 24), visits.order, None, 2),
    }
    want = {
        "relu2": squared_relu_torch(x),
        "relu2 backward": 2 * x.relu() * x.flip(0),
        "permute": x[visits.tokens],
        "unpermute": sum_by_token(rows, visits),
        "expanded": x[:1, :1].expand(12, 24),
    }
    assert_same(got, want, 1e-6)


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = moe_inputs(T=60, E=8, K=4, dtype=torch.bfloat16)
    first, second = (results_and_gradients(experts(activation=squared_relu), inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


def test_the_operators_are_what_they_say_to_torch():
    visits = visits_of(5, 2, 3, absent=True)
    x, rows, weights = (normal(*shape).to(DEVICE) for shape in ((5, 6), (10, 6), (10,)))
    check = torch.library.opcheck
    check(relu2._squared_relu, (x.clone().requires_grad_(),))
    check(relu2._squared_relu_backward, (x, x))
    whole = sort_by_expert(torch.zeros(5, 2, dtype=torch.int64, device=DEVICE), 3)
    check(moe._permute, (x, whole.order, None, 2))
    check(moe._unpermute, (rows, visits.place, visits.end, 2))
    check(moe._relu2, (rows, weights, whole.order, None))
    check(moe._relu2_backward, (rows.clone(), rows, weights, whole.order, None))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(assert_same, results_and_gradients):
    inputs = moe_inputs(dtype=torch.bfloat16)  # torch compiles no other grouped_mm
    run = experts(activation=squared_relu, products=GROUPED_MM)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(run, inputs), 0.0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_grouped_experts_with_squared_relu_in_triton_are_one_graph(assert_same, results_and_gradients):
    inputs = moe_inputs(dtype=torch.bfloat16)
    activation = partial(squared_relu, backend="triton")
    run = experts(partial(expert_mlp_grouped, products=GROUPED_MM), activation=activation)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(run, inputs), 2e-2)


def test_nothing_waits_for_the_host():
    """Kernels are listed and not run: it is the host's code that could wait."""
    how = {"activation": squared_relu, "products": GROUPED_MM, "absent": True}
    inputs = {k: v.to(DEVICE).requires_grad_(v.is_floating_point()) for k, v in moe_inputs().items()}
    with launching.recording(80) as launches, nothing_waits():
        y = moe.expert_mlp_triton(**inputs, **how)
        torch.autograd.grad(y, [value for value in inputs.values() if value.requires_grad], torch.empty_like(y))
    names = [start.kernel.__name__ for start in launches]
    forward = ["moe_permute", "relu2_forward", "moe_unpermute"]
    assert names == [*forward, "moe_permute", "relu2_backward", "moe_permute", "moe_unpermute"]


def test_launches_can_be_recorded_without_data():
    x, order = torch.empty(64, 16, device="meta", dtype=torch.bfloat16), torch.empty(128, device="meta").long()
    weights = relu2.Weights(torch.empty(128, device="meta"), order, order[:1].int())
    with launching.recording(90) as launches:
        rows = moe.permute(x, order, None, 2)
        hidden = relu2.forward(rows, weights)
        assert [t.shape for t in relu2.weighted_backward(hidden, rows, weights)] == [(128, 16), (128,)]
        assert moe.unpermute(rows, order, weights.end, 2).shape == x.shape
        relu2.backward(x, x)
    assert len(launches) == 5


def test_the_kernels_are_the_first_choice_where_they_run(monkeypatch):
    assert [*backends(torch.bfloat16)] == ["triton", "grouped", "torch"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    possible = backends(torch.bfloat16, 64, 36)
    assert possible["triton"].obstacle(torch.device("cuda")) is None
    assert possible["grouped"].obstacle(torch.device("cuda")) is not None
    inputs = moe_inputs(T=3)
    (by_name,) = experts(expert_mlp, activation=squared_relu, backend="triton")(**inputs)
    assert torch.equal(by_name, experts(activation=squared_relu)(**inputs)[0])
    with pytest.raises(BackendError, match="bfloat16 and float32, not float64"):
        expert_mlp(**in_double(inputs), activation=squared_relu, backend="triton")
