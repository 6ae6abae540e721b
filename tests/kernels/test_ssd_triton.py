"""The Triton kernels of the scan against the sequential oracle: on a GPU where there is one, else in the interpreter."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import in_double, scan_inputs

from nemohybrid_kernels import launching
from nemohybrid_kernels.errors import BackendError
from nemohybrid_kernels.ssd import ssd_scan
from nemohybrid_kernels.ssd.reference import ssd_sequential

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scan(chunk_size=16, **inputs):
    """The Triton scan on this machine's device; results where the inputs were."""
    placed = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    return tuple(t.cpu() for t in ssd_scan(**placed, chunk_size=chunk_size, backend="triton"))


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_values_and_all_gradients_equal_the_sequential_oracle(
    dtype, tolerance, G, documents, assert_same, results_and_gradients
):
    inputs = scan_inputs(batch=1, L=37, H=2, G=G, dtype=dtype, documents=documents)
    got = results_and_gradients(scan, inputs)
    assert got["out0"].dtype == dtype
    assert got["out1"].dtype == torch.float32
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), tolerance)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_a_chunk_of_several_tiles_equals_the_oracle(documents, assert_same, results_and_gradients):
    """Chunks of 128 are two tiles of 64: pairs of different tiles, and parts to be added."""
    inputs = scan_inputs(batch=1, L=150, H=2, P=16, G=1, N=16, dtype=torch.float32, documents=documents)
    got = results_and_gradients(lambda **i: scan(128, **i), inputs)
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_a_long_row_of_few_heads_in_segments_equals_the_oracle(documents, assert_same, results_and_gradients):
    """Nine chunks make two segments, each begun with zeros and then with what the other left."""
    inputs = scan_inputs(batch=1, L=140, H=2, G=1, dtype=torch.float32, state=True)
    if documents:
        inputs["document_ids"] = (torch.arange(140)[None] > 90).int()
    with launching.recording(90) as launches:
        ssd_launches(inputs)
    assert "ssd_combine" in {launch.kernel.__name__ for launch in launches}, "the row was not cut into segments"
    got = results_and_gradients(scan, inputs)
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


def test_a_short_row_cut_like_a_long_one_equals_the_oracle(assert_same, results_and_gradients):
    """As the canary compares it: more segments than the row has chunks, some of which are empty."""
    inputs = scan_inputs(batch=1, L=37, H=2, G=1, dtype=torch.float32, documents=True)
    with launching.cut_like(1, 1000):
        with launching.recording(90) as launches:
            ssd_launches(inputs)
        segments = {launch.arguments.get("segments") for launch in launches} - {None}
        got = results_and_gradients(scan, inputs)
    assert segments == {15}
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


def ssd_launches(inputs):
    from nemohybrid_kernels.ssd.triton import Call, forward

    forward(Call(*(inputs[name] for name in ("x", "dt", "A", "B", "C", "D")), chunk_size=16))


def test_a_group_of_more_heads_than_a_program_takes_equals_the_oracle(monkeypatch, assert_same, results_and_gradients):
    """Three heads in blocks of two, the last of which is not full; at one group of 128 heads there are eight of them. With
    few tokens a program would have one head."""
    table = deepcopy(launching.table())
    for kernels in table.values():
        for entry in (*kernels["ssd_scan"], *kernels["ssd_pair_gradients"]):
            entry["tiles"]["HEADS"] = 2
    monkeypatch.setattr(launching, "table", lambda: table)
    inputs = scan_inputs(batch=1, L=21, H=6, G=2, dtype=torch.float32, documents=True)
    with launching.cut_like(64, 8192):
        got = results_and_gradients(scan, inputs)
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


@settings(max_examples=3, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_oracle(data, assert_same, results_and_gradients):
    P, N = (data.draw(st.integers(1, 20), label=name) for name in "PN")
    G, L, chunk = (data.draw(st.integers(1, most), label=name) for name, most in (("G", 2), ("L", 40), ("chunk", 40)))
    heads = G * data.draw(st.integers(1, 3), label="heads of a group")
    documents, state = data.draw(st.booleans(), label="documents"), data.draw(st.booleans(), label="state")
    inputs = scan_inputs(1, L, heads, P, G, N, torch.float32, documents, state, seed=L)
    if data.draw(st.booleans(), label="without D"):
        del inputs["D"]
    got = results_and_gradients(lambda **i: scan(chunk, **i), inputs)
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


def test_decays_too_strong_for_a_float_stay_finite_and_exact(assert_same, results_and_gradients):
    inputs = scan_inputs(batch=1, L=40, dtype=torch.float32, state=True)
    inputs["A"] = torch.tensor([-1e-4, -1.0, -1e3, -1e6])
    inputs["dt"][:, 3:7] = 0.0
    got = results_and_gradients(scan, inputs)
    assert all(tensor.isfinite().all() for tensor in got.values()), "a decay overflowed"
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-4)


def test_strong_decays_of_one_document_cost_the_next_no_digits():
    inputs = scan_inputs(batch=1, L=64, H=2, G=1, dtype=torch.float32, state=False)
    inputs["dt"], inputs["A"], border = inputs["dt"] * 0.1, torch.tensor([-1.0, -16.0]), 40
    inputs["dt"][:, :border] *= 100
    packed, _ = scan(64, document_ids=torch.arange(64).ge(border).int()[None], **inputs)
    tail = {name: t[:, border:] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}
    alone, _ = ssd_sequential(**tail)
    error = (packed[:, border:].double() - alone).abs().max() / alone.abs().max()
    assert error < 2e-6, f"{error:.1e}"


def test_columns_of_wider_rows_are_taken_as_they_are(assert_same, results_and_gradients):
    inputs = scan_inputs(batch=2, L=20, H=2, G=1, dtype=torch.float32)

    def widened(**tensors):
        wide = {
            name: torch.cat([t, t], dim=-1)[..., : t.shape[-1]] if name in ("x", "dt", "B", "C") else t
            for name, t in tensors.items()
        }
        return scan(**wide)

    assert_same(results_and_gradients(widened, inputs), results_and_gradients(scan, inputs), 0.0)


def test_numbers_of_heads_with_gaps_in_memory_are_read_where_they_are(assert_same, results_and_gradients):
    inputs = scan_inputs(batch=1, L=20, dtype=torch.float32)

    def spread(A, D, **others):
        A, D = torch.stack([A, D], 1).unbind(1)
        return scan(A=A, D=D, **others)

    assert_same(results_and_gradients(spread, inputs), results_and_gradients(scan, inputs), 0.0)


def test_results_lie_in_memory_as_torch_was_told_however_arguments_do():
    """torch.compile relies on it."""
    from nemohybrid_kernels.ssd.triton.op import _scan, _scan_backward

    inputs = {name: tensor.to(DEVICE) for name, tensor in scan_inputs(dtype=torch.float32).items()}
    inputs |= {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "B", "C")}
    arguments = (*(inputs[name] for name in ("x", "dt", "A", "B", "C", "D")), None, inputs["initial_state"], 16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(_scan, arguments, test_utils=tests)
    d_final = inputs["initial_state"].mT.contiguous().mT
    torch.library.opcheck(_scan_backward, (inputs["x"], d_final, *arguments), test_utils=tests)


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = scan_inputs(batch=1, L=40, H=2, dtype=torch.bfloat16, documents=True)
    first, second = results_and_gradients(scan, inputs), results_and_gradients(scan, inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


def test_what_it_cannot_take_is_refused_with_the_reason():
    x, dt, A = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1), -torch.ones(1)
    wide = torch.ones(1, 2, 1, 257)
    with pytest.raises(BackendError, match=r"'triton' cannot run .*states up to 256, not 4 and 257"):
        ssd_scan(x, dt, A, wide, wide, backend="triton")
    with pytest.raises(BackendError, match=r"take bfloat16 and float32, not float64"):
        ssd_scan(x.double(), dt, A, x.double(), x.double(), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    from nemohybrid_kernels.backend import decide
    from nemohybrid_kernels.ssd import backends

    choice = decide("ssd_scan", "auto", backends(torch.float32), torch.device("cpu"))
    assert choice.backend == "torch"
    assert "not triton: the interpreter is for tests" in choice.why
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a CUDA device" in decide("ssd_scan", "auto", backends(torch.float32), torch.device("cpu")).why
