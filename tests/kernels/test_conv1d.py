import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch


def conv_inputs(B=2, L=19, C=16, K=4, dtype=torch.float64, documents=False, state=True, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (B, L, C), "weight": (C, K)} | ({"bias": (C,)} if bias else {})
    shapes |= {"initial_state": (B, K - 1, C)} if state else {}
    inputs = {k: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}
    if documents:
        inputs["document_ids"] = torch.randint(0, 3, (B, L), generator=g)
    return inputs


def conv_oracle(x, weight, bias=None, activation="silu", document_ids=None, initial_state=None):
    """Tap by tap and token by token in float64, as the docstring of the operator says it."""
    (B, L, C), K = x.shape, weight.shape[1]
    x, weight = x.double(), weight.double()
    zero = x.new_zeros(C)
    if document_ids is None:
        document_ids = torch.zeros(B, L, dtype=torch.long)

    def at(b, t, s):  # the input at position s, as a token at t sees it
        if s >= 0:
            return x[b, s] if (document_ids[b, s : t + 1] == document_ids[b, t]).all() else zero
        first = (document_ids[b, : t + 1] == document_ids[b, 0]).all()
        return initial_state[b, K - 1 + s].double() if initial_state is not None and first else zero

    window = [[[at(b, t, t - K + 1 + k) for k in range(K)] for t in range(L)] for b in range(B)]
    y = torch.stack([torch.stack([(torch.stack(taps, dim=1) * weight).sum(1) for taps in row]) for row in window])
    y = y if bias is None else y + bias.double()
    # The state a next token of the same document would see, in its K-1 taps before itself.
    final = [torch.stack(row[-1][1:]) if K > 1 else x.new_zeros(0, C) for row in window]
    return (torch.nn.functional.silu(y) if activation else y), torch.stack(final)


def usable(inputs, K):
    """Leave out the empty initial state of K = 1: nothing flows through it."""
    return {k: v for k, v in inputs.items() if K > 1 or k != "initial_state"}


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 1e-2)],
    ids=["fp64", "fp32", "bf16"],
)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_values_and_all_gradients_equal_the_oracle(K, dtype, tolerance, documents, assert_same, results_and_gradients):
    inputs = usable(conv_inputs(K=K, dtype=dtype, documents=documents), K)
    want = results_and_gradients(conv_oracle, {k: v if k == "document_ids" else v.double() for k, v in inputs.items()})
    got = results_and_gradients(causal_conv1d, inputs)
    assert got["out0"].dtype == got["out1"].dtype == dtype
    assert_same(got, want, tolerance)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("K, state, bias", [(1, False, True), (4, True, True), (3, False, False)])
def test_documents_in_a_graph_equal_the_oracle(K, state, bias, assert_same, results_and_gradients):
    """torch.compile gets a formula of its own: sizes that depend on the ids are nothing for it."""
    inputs = conv_inputs(K=K, state=state, bias=bias, documents=True)
    torch.compiler.reset()
    traced = torch.compile(causal_conv1d_torch, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(results_and_gradients(traced, inputs), results_and_gradients(conv_oracle, inputs), 1e-12)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_oracle(data, assert_same, results_and_gradients):
    sizes = {name: data.draw(st.integers(1, 5), label=name) for name in ("B", "C", "K")}
    flags = {name: data.draw(st.booleans(), label=name) for name in ("documents", "state", "bias")}
    inputs = usable(conv_inputs(L=data.draw(st.integers(1, 9), label="L"), **sizes, **flags), sizes["K"])
    activation = data.draw(st.sampled_from(["silu", None]), label="activation")
    got = results_and_gradients(lambda **i: causal_conv1d(**i, activation=activation), inputs)
    assert_same(got, results_and_gradients(lambda **i: conv_oracle(**i, activation=activation), inputs), 1e-12)


def test_documents_equal_separately_run_rows_with_all_gradients(assert_same, results_and_gradients):
    lengths, ids = (5, 1, 2, 8, 3), (3, 1, 3, 0, 9)
    inputs = conv_inputs(B=1, L=sum(lengths))

    def packed(**i):
        return causal_conv1d(**i, document_ids=torch.tensor(ids).repeat_interleave(torch.tensor(lengths))[None])

    def separate(x, weight, bias, initial_state):
        states = (initial_state, *(None for _ in lengths[1:]))
        pieces = zip(x.split(lengths, dim=1), states, strict=True)
        rows, finals = zip(*(causal_conv1d(p, weight, bias, initial_state=s) for p, s in pieces), strict=True)
        return torch.cat(rows, dim=1), finals[-1]

    assert_same(results_and_gradients(packed, inputs), results_and_gradients(separate, inputs), 1e-12)


def test_not_even_infinity_leaks_into_the_next_document():
    x, weight = torch.ones(1, 8, 3), torch.ones(3, 4)
    x[:, :4] = torch.inf
    y, final = causal_conv1d(x, weight, document_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2]]))
    assert y[:, 4:].isfinite().all()
    assert torch.equal(final[0, :, 0], torch.tensor([0.0, 1.0, 1.0])), "decoding would see the earlier document"


@pytest.mark.parametrize("cuts", [(11,), (1,) * 18, (2, 1, 1)], ids=["two calls", "token by token", "short calls"])
def test_a_row_in_several_calls_equals_one_call(cuts, assert_same, results_and_gradients):
    inputs = conv_inputs(L=19)

    def in_calls(x, weight, bias, initial_state):
        rows, state = [], initial_state
        for piece in x.split((*cuts, 19 - sum(cuts)), dim=1):
            y, state = causal_conv1d(piece, weight, bias, initial_state=state)
            rows.append(y)
        return torch.cat(rows, dim=1), state

    assert_same(results_and_gradients(in_calls, inputs), results_and_gradients(causal_conv1d, inputs), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_are_equal_bit_by_bit(dtype, results_and_gradients):
    inputs = conv_inputs(L=64, C=64, dtype=dtype, documents=True)
    first, second = results_and_gradients(causal_conv1d, inputs), results_and_gradients(causal_conv1d, inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"
