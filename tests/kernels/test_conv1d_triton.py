"""The Triton kernels of the causal convolution: on a GPU where there is one, and interpreted on the CPU elsewhere.

What they are held to is the PyTorch twin in float64, which test_conv1d.py holds to the formula.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels import launching
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.errors import BackendError

pytest.importorskip("triton")

from nemohybrid_kernels.conv1d import triton as conv1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)


def conv_inputs(B=2, L=9, C=20, K=4, dtype=torch.float32, documents=False, state=True, bias=True, seed=0):
    """`documents` of about four tokens. Parameters are fp32 whatever x is."""
    g = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(B, L, C, generator=g).to(dtype), "weight": torch.randn(C, K, generator=g)}
    if bias:
        inputs["bias"] = torch.randn(C, generator=g)
    if state and K > 1:
        inputs["initial_state"] = torch.randn(B, K - 1, C, generator=g).to(dtype)
    if documents:
        inputs["document_ids"] = (torch.rand(B, L, generator=g) < 0.25).cumsum(1)
    return inputs


def in_double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def with_triton(activation="silu"):
    """On the device where kernels run; inputs and results are on the CPU."""

    def run(**inputs):
        moved = {name: value.to(DEVICE) for name, value in inputs.items()}
        return tuple(out.cpu() for out in causal_conv1d(**moved, activation=activation, backend="triton"))

    return run


def with_torch(activation="silu"):
    return lambda **inputs: causal_conv1d(**inputs, activation=activation, backend="torch")


@pytest.fixture
def short_spans(monkeypatch):
    """Many programs for a row, so that what passes between them can be seen in few tokens."""
    monkeypatch.setattr(conv1d, "SHORTEST_SPAN", 5)


@DTYPES
@pytest.mark.parametrize("documents, bias", [(False, False), (True, True)], ids=["one document", "documents and bias"])
@pytest.mark.parametrize("K, L", [(1, 9), (2, 9), (4, 2), (4, 37)])
def test_values_and_all_gradients_equal_float64(
    K, L, documents, bias, dtype, tolerance, assert_same, results_and_gradients
):
    inputs = conv_inputs(K=K, L=L, dtype=dtype, documents=documents, bias=bias, state=documents)
    got = results_and_gradients(with_triton(), inputs)
    assert got["out0"].dtype == got["out1"].dtype == got["d_x"].dtype == dtype
    assert got["d_weight"].dtype == torch.float32
    assert_same(got, results_and_gradients(with_torch(), in_double(inputs)), tolerance)


@settings(max_examples=7, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape_equals_float64(data, assert_same, results_and_gradients):
    sizes = {name: data.draw(st.integers(1, 5), label=name) for name in ("C", "K", "L")}
    flags = {name: data.draw(st.booleans(), label=name) for name in ("documents", "state", "bias")}
    inputs = conv_inputs(B=data.draw(st.integers(1, 2), label="B"), **sizes, **flags)
    activation = data.draw(st.sampled_from(["silu", None]), label="activation")
    want = results_and_gradients(with_torch(activation), in_double(inputs))
    assert_same(results_and_gradients(with_triton(activation), inputs), want, 5e-6)


def test_more_channels_than_a_strip_and_more_taps_than_usual(assert_same, results_and_gradients):
    inputs = conv_inputs(B=1, L=11, C=70, K=6, documents=True)
    want = results_and_gradients(with_torch(), in_double(inputs))
    assert_same(results_and_gradients(with_triton(), inputs), want, 5e-6)


@pytest.mark.usefixtures("short_spans")
def test_spans_hand_over_what_the_next_one_needs(assert_same, results_and_gradients):
    """Spans of 8: documents begin on their boundaries, and within the K-1 tokens on both sides of them."""
    inputs = conv_inputs(B=1, L=23)
    inputs["document_ids"] = torch.tensor([[0] * 4 + [1] + [2] * 3 + [3] * 6 + [4] * 2 + [5] * 2 + [6] * 5])
    want = results_and_gradients(with_torch(), in_double(inputs))
    assert_same(results_and_gradients(with_triton(), inputs), want, 5e-6)


@DTYPES
def test_parts_of_wider_rows_are_read_and_written_in_place(dtype, tolerance):
    inputs = {k: v.to(DEVICE) for k, v in conv_inputs(dtype=dtype, documents=True).items()}
    starts = document_starts(inputs.pop("document_ids"))
    x, weight, bias, initial = (inputs[name] for name in ("x", "weight", "bias", "initial_state"))
    dy = torch.randn_like(x)
    rows = {name: x.new_full((2, 12, 50), 7.0) for name in ("x", "y", "dy", "dx")}
    inner = {name: row[:, 2:11, 13:33] for name, row in rows.items()}
    inner["x"].copy_(x)
    inner["dy"].copy_(dy)

    conv1d.forward(inner["x"], weight, bias, starts, initial, True, y=inner["y"])
    got = conv1d.backward(inner["dy"], inner["x"], weight, bias, starts, initial, True, dx=inner["dx"])
    want = conv1d.backward(dy, x, weight, bias, starts, initial, True)

    assert got.x.data_ptr() == inner["dx"].data_ptr()
    assert torch.equal(inner["y"], conv1d.forward(x, weight, bias, starts, initial, True))
    for name, expected in want._asdict().items():
        assert torch.equal(getattr(got, name), expected), name
    for name, row in rows.items():
        inner[name].fill_(7.0)
        assert (row == 7).all(), f"{name}: neighbours were written"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, where infinity may be
def test_a_bias_with_gaps_in_memory_is_read_where_it_is(assert_same, results_and_gradients):
    inputs = conv_inputs()

    def spread(bias, **others):
        return with_triton()(bias=torch.stack([bias, -bias], 1)[:, 0], **others)

    assert_same(results_and_gradients(spread, inputs), results_and_gradients(with_triton(), inputs), 0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # within the document it is no number
def test_not_even_infinity_leaks_into_another_document():
    x, weight = torch.ones(1, 8, 3, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    starts = document_starts(torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]], device=DEVICE))
    x[:, 4:6] = torch.inf
    assert conv1d.forward(x, weight, None, starts, None, True)[:, 6:].isfinite().all()
    assert torch.equal(conv1d.final_state(x, starts, None, 3)[0, :, 0].cpu(), torch.tensor([0.0, 1.0, 1.0]))
    dx = conv1d.backward(torch.ones_like(x), x, weight, None, starts, None, True).x
    assert dx[:, :4].isfinite().all()
    assert dx[:, 6:].isfinite().all()
    dx = conv1d.backward(x, torch.ones_like(x), weight, None, starts, None, True).x
    assert dx[:, :4].isfinite().all(), "a gradient of infinity passed the border"


@pytest.mark.usefixtures("short_spans")
def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = conv_inputs(B=1, L=15, dtype=torch.bfloat16, documents=True)
    first, second = (results_and_gradients(with_triton(), inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


@pytest.mark.parametrize("full", [False, True], ids=["x and weight", "everything"])
def test_the_operators_are_what_they_say_to_torch(full):
    inputs = {k: v.to(DEVICE) for k, v in conv_inputs(B=1, L=2, documents=True).items()}
    floating = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "initial_state")]
    x, weight, bias, initial = floating if full else [*floating[:2], None, None]
    starts = document_starts(inputs["document_ids"]) if full else None
    torch.library.opcheck(conv1d._conv, (x, weight, bias, starts, initial, True))
    with torch.no_grad():
        backward_arguments = (torch.randn_like(x), x.detach(), weight.detach(), bias, starts, initial, True)
        torch.library.opcheck(conv1d._conv_backward, backward_arguments)


def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(assert_same, results_and_gradients):
    inputs = conv_inputs(B=1, L=5, documents=True)
    compiled = torch.compile(with_triton(), fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(with_triton(), inputs), 0.0)


def test_launches_can_be_recorded_without_data():
    x = torch.empty(2, 5000, 40, device="meta", dtype=torch.bfloat16)[:, :, :30]
    weight, initial = torch.empty(30, 4, device="meta"), torch.empty(2, 3, 30, device="meta")
    starts = torch.empty(2, 5000, device="meta", dtype=torch.int32)
    with launching.recording(80) as launches:
        y = conv1d.forward(x, weight, None, starts, initial, True)
        got = conv1d.backward(y, x, weight, None, starts, initial, True)
        state = conv1d.final_state(x, starts, initial, 3)
    assert [start.kernel.__name__ for start in launches] == ["conv1d_forward", "conv1d_backward"]
    assert (y.shape, got.weight.shape, got.bias.shape, state.shape) == (x.shape, (30, 4), (30,), (2, 3, 30))


def test_float64_is_refused():
    with pytest.raises(BackendError, match="bfloat16 and float32, not float64"):
        causal_conv1d(torch.ones(1, 2, 3, dtype=torch.float64), torch.ones(3, 2), backend="triton")
