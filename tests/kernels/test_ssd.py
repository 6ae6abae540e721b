import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import in_double, scan_inputs

from nemohybrid_kernels.ssd import ssd_scan
from nemohybrid_kernels.ssd.reference import ssd_sequential


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_values_and_all_gradients_equal_the_sequential_oracle(
    dtype, tolerance, G, documents, assert_same, results_and_gradients
):
    inputs = scan_inputs(L=45, G=G, dtype=dtype, documents=documents)
    want = results_and_gradients(ssd_sequential, in_double(inputs))
    got = results_and_gradients(lambda **i: ssd_scan(**i, chunk_size=16), inputs)
    assert got["out0"].dtype == dtype
    assert got["out1"].dtype == inputs["dt"].dtype
    assert_same(got, want, tolerance)


@pytest.mark.parametrize("P", [32, 64])
def test_the_default_chunk_is_exact_at_the_sizes_of_a_real_row(P, assert_same, results_and_gradients):
    inputs = scan_inputs(batch=1, L=150, H=2, P=P, G=1, N=32, dtype=torch.float32, documents=True)
    inputs["dt"] *= 0.1  # the range that Mamba-2 starts from
    want = results_and_gradients(ssd_sequential, in_double(inputs))
    assert_same(results_and_gradients(ssd_scan, inputs), want, 1e-5)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_oracle(data, assert_same, results_and_gradients):
    sizes = {name: data.draw(st.integers(1, 4), label=name) for name in ("batch", "G", "P", "N")}
    L, chunk = data.draw(st.integers(1, 20), label="L"), data.draw(st.integers(1, 24), label="chunk")
    heads = sizes["G"] * data.draw(st.integers(1, 3), label="heads of a group")
    documents, state = data.draw(st.booleans(), label="documents"), data.draw(st.booleans(), label="state")
    inputs = scan_inputs(L=L, H=heads, documents=documents, state=state, seed=L, **sizes)
    if data.draw(st.booleans(), label="without D"):
        del inputs["D"]
    got = results_and_gradients(lambda **i: ssd_scan(**i, chunk_size=chunk), inputs)
    assert_same(got, results_and_gradients(ssd_sequential, inputs), 1e-11)


def test_documents_equal_separately_run_rows_with_all_gradients(assert_same, results_and_gradients):
    lengths, ids = (9, 1, 17, 6), (5, 2, 5, 0)
    inputs = scan_inputs(batch=1, L=sum(lengths))

    def packed(**i):
        document_ids = torch.tensor(ids).repeat_interleave(torch.tensor(lengths))[None]
        return ssd_scan(**i, document_ids=document_ids, chunk_size=8)

    def separate(x, dt, A, B, C, D, initial_state):
        states = (initial_state, *(None for _ in lengths[1:]))
        pieces = zip(*(t.split(lengths, dim=1) for t in (x, dt, B, C)), states, strict=True)
        results = [ssd_scan(x, dt, A, B, C, D, initial_state=s, chunk_size=8) for x, dt, B, C, s in pieces]
        rows, finals = zip(*results, strict=True)
        return torch.cat(rows, dim=1), finals[-1]

    assert_same(results_and_gradients(packed, inputs), results_and_gradients(separate, inputs), 1e-12)


@pytest.mark.parametrize("cuts", [(13,), (1,) * 20, (16, 1, 3)], ids=["two calls", "token by token", "prefill, decode"])
def test_a_row_in_several_calls_equals_one_call(cuts, assert_same, results_and_gradients):
    inputs = scan_inputs(L=21)
    lengths = (*cuts, 21 - sum(cuts))

    def in_calls(x, dt, A, B, C, D, initial_state):
        rows, state = [], initial_state
        for piece in zip(*(t.split(lengths, dim=1) for t in (x, dt, B, C)), strict=True):
            y, state = ssd_scan(piece[0], piece[1], A, piece[2], piece[3], D, initial_state=state)
            rows.append(y)
        return torch.cat(rows, dim=1), state

    whole = results_and_gradients(lambda **i: ssd_scan(**i, chunk_size=8), inputs)
    assert_same(results_and_gradients(in_calls, inputs), whole, 1e-12)


def test_decays_too_strong_for_a_float_stay_finite_and_exact(assert_same, results_and_gradients):
    inputs = scan_inputs(L=40, dtype=torch.float32)
    inputs["A"] = torch.tensor([-1e-4, -1.0, -1e3, -1e6])
    got = results_and_gradients(lambda **i: ssd_scan(**i, chunk_size=16), inputs)
    assert all(tensor.isfinite().all() for tensor in got.values()), "a decay overflowed"
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-4)


def test_a_step_of_zero_length_keeps_the_state_and_has_gradients(assert_same, results_and_gradients):
    inputs = scan_inputs(L=12)
    inputs["dt"][:, 3:7] = 0.0
    got = results_and_gradients(lambda **i: ssd_scan(**i, chunk_size=5), inputs)
    assert_same(got, results_and_gradients(ssd_sequential, inputs), 1e-12)


def test_the_handwritten_backward_passes_gradcheck():
    inputs = scan_inputs(batch=1, L=5, H=2, P=2, G=1, N=2, documents=True)
    document_ids = inputs.pop("document_ids")
    state = inputs.pop("initial_state").requires_grad_()
    tensors = (*(t.requires_grad_() for t in inputs.values()), state)

    def scan(*args):
        return ssd_scan(*args[:-1], initial_state=args[-1], document_ids=document_ids, chunk_size=2)

    assert torch.autograd.gradcheck(scan, tensors)


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = scan_inputs(L=70, dtype=torch.bfloat16, documents=True)
    first, second = results_and_gradients(ssd_scan, inputs), results_and_gradients(ssd_scan, inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


def test_strong_decays_of_one_document_cost_the_next_no_digits():
    """The sums of log decays reach -1000 in the first document; fp32 differences of such sums are good to 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(1, 64, 4, 16, generator=generator), torch.rand(1, 64, 4, generator=generator) * 0.1
    B, C = torch.randn(1, 64, 2, 8, generator=generator), torch.randn(1, 64, 2, 8, generator=generator)
    A, border = -torch.tensor([1.0, 4.0, 8.0, 16.0]), 40
    dt[:, :border] *= 100
    ids = torch.arange(64).ge(border).int()[None]
    packed, _ = ssd_scan(x, dt, A, B, C, document_ids=ids, chunk_size=64)
    alone, _ = ssd_sequential(x[:, border:], dt[:, border:], A, B[:, border:], C[:, border:])
    error = (packed[:, border:].double() - alone).abs().max() / alone.abs().max()
    assert error < 2e-6, f"{error:.1e}"
