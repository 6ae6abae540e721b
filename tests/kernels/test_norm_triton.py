"""The Triton kernels of the norms: on a GPU where there is one, and interpreted on the CPU elsewhere.

What they are held to is the PyTorch twin in float64, which test_norm.py holds to the formula.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels import launching
from nemohybrid_kernels.errors import BackendError
from nemohybrid_kernels.norm import gated_rms_norm, rms_norm

pytest.importorskip("triton")

from nemohybrid_kernels.norm import triton as norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)


def norm_inputs(*shape, dtype=torch.float32, seed=0):
    """The weight is fp32 whatever x is."""
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return {"x": x, "z": z, "weight": torch.randn(shape[-1], generator=g)}


def without_gate(inputs):
    return {name: value for name, value in inputs.items() if name != "z"}


def in_double(inputs):
    return {name: value.double() for name, value in inputs.items()}


def plain(backend):
    """On the device where the backend runs; inputs and result are on the CPU."""

    def run(x, weight):
        device = DEVICE if backend == "triton" else "cpu"
        return (rms_norm(x.to(device), weight.to(device), EPS, backend=backend).cpu(),)

    return run


def gated(backend, group_size):
    def run(x, z, weight):
        x, z, weight = (t.to(DEVICE if backend == "triton" else "cpu") for t in (x, z, weight))
        return (gated_rms_norm(x, z, weight, group_size=group_size, eps=EPS, backend=backend).cpu(),)

    return run


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 24), (300, 96), (3, 2048), (2, 5000), (2, 12288)], ids=str)
def test_rms_norm_and_its_gradients_equal_float64(shape, dtype, tolerance, assert_same, results_and_gradients):
    inputs = without_gate(norm_inputs(*shape, dtype=dtype))
    got = results_and_gradients(plain("triton"), inputs)
    assert got["out0"].dtype == got["d_x"].dtype == dtype
    assert got["d_weight"].dtype == torch.float32
    assert_same(got, results_and_gradients(plain("torch"), in_double(inputs)), tolerance)


@DTYPES
@pytest.mark.parametrize("group_size", [24, 64, 1024, 1280, 8192])
def test_gated_norm_and_its_gradients_equal_float64(group_size, dtype, tolerance, assert_same, results_and_gradients):
    groups = 2 if group_size > 1024 else 3
    inputs = norm_inputs(1, 7, groups * group_size, dtype=dtype)
    got = results_and_gradients(gated("triton", group_size), inputs)
    assert got["out0"].dtype == got["d_x"].dtype == got["d_z"].dtype == dtype
    assert_same(got, results_and_gradients(gated("torch", group_size), in_double(inputs)), tolerance)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(rows=st.integers(0, 5), groups=st.integers(1, 4), size=st.integers(2, 40))
def test_any_shape_equals_float64(rows, groups, size, assert_same, results_and_gradients):
    inputs = norm_inputs(rows, groups * size)
    want = results_and_gradients(gated("torch", size), in_double(inputs))
    assert_same(results_and_gradients(gated("triton", size), inputs), want, 2e-5)


def test_programs_that_take_many_tokens_each(monkeypatch, assert_same, results_and_gradients):
    """Two programs for each group, and more tokens than both hold at once, the last time not all of them."""
    monkeypatch.setattr(norm, "WARPS", 16)
    inputs = norm_inputs(37, 2 * 250)
    want = results_and_gradients(gated("torch", 250), in_double(inputs))
    assert_same(results_and_gradients(gated("triton", 250), inputs), want, 2e-6)


def test_parts_of_wider_rows_are_read_and_written_in_place():
    inputs = {name: value.to(DEVICE) for name, value in norm_inputs(2, 5, 48).items()}
    x, z, weight = inputs.values()
    dout = torch.randn_like(x)
    rows = {name: x.new_full((2, 5, 90), 7.0) for name in ("x", "z", "dout", "dz")}
    inner = {name: row[:, :, 13:61] for name, row in rows.items()}
    for name, value in (("x", x), ("z", z), ("dout", dout)):
        inner[name].copy_(value)

    out, rstd = norm.gated_forward(inner["x"], inner["z"], weight, 16, EPS)
    got = norm.gated_backward(inner["dout"], inner["x"], inner["z"], weight, rstd, 16, dz=inner["dz"])

    assert out.is_contiguous()
    assert torch.equal(out, norm.gated_forward(x, z, weight, 16, EPS)[0])
    assert got[1].data_ptr() == inner["dz"].data_ptr()
    want = norm.gated_backward(dout, x, z, weight, rstd, 16)
    for name, part, expected in zip(("dx", "dz", "dweight"), got, want, strict=True):
        assert torch.equal(part, expected), name
    for name, row in rows.items():
        inner[name].fill_(7.0)
        assert (row == 7).all(), f"{name}: neighbours were written"


def test_a_weight_with_gaps_in_memory_is_read_where_it_is(assert_same, results_and_gradients):
    inputs = norm_inputs(5, 24)
    run = gated("triton", 8)

    def spread(weight, **others):
        return run(weight=torch.stack([weight, -weight], 1)[:, 0], **others)

    assert_same(results_and_gradients(spread, inputs), results_and_gradients(run, inputs), 0.0)


def test_rows_of_zeros_stay_zero_with_finite_gradients(results_and_gradients):
    inputs = {"x": torch.zeros(2, 8), "weight": torch.ones(8)}
    results = results_and_gradients(plain("triton"), inputs)
    assert not results["out0"].any()
    for name, tensor in results.items():
        assert tensor.isfinite().all(), f"{name} is not finite for a row of zeros"


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = norm_inputs(64, 96, dtype=torch.bfloat16)
    first, second = (results_and_gradients(gated("triton", 32), inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


def test_the_operators_are_what_they_say_to_torch():
    x, z, weight = (value.to(DEVICE).requires_grad_() for value in norm_inputs(2, 3, 24).values())
    torch.library.opcheck(norm._rms, (x, weight, EPS))
    torch.library.opcheck(norm._gated, (x, z, weight, 8, EPS))
    x, z, weight = (value.detach() for value in (x, z, weight))
    torch.library.opcheck(norm._rms_backward, (x, x, weight, norm.rms_forward(x, weight, EPS)[1]))
    torch.library.opcheck(norm._gated_backward, (x, x, z, weight, norm.gated_forward(x, z, weight, 8, EPS)[1], 8))


def test_a_compiled_graph_has_no_breaks_and_the_same_gradients(assert_same, results_and_gradients):
    def both(x, z, weight):
        return gated("triton", 8)(*plain("triton")(x, weight), z, weight)

    inputs = norm_inputs(3, 24)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(both, inputs), 0.0)


def test_launches_can_be_recorded_without_data():
    x, weight = torch.empty(2, 5000, 96, device="meta", dtype=torch.bfloat16), torch.empty(96, device="meta")
    with launching.recording(80) as launches:
        out, rstd = norm.gated_forward(x, x, weight, 32, EPS)
        dweight = norm.gated_backward(out, x, x, weight, rstd, 32)[2]
        y, scale = norm.rms_forward(x, weight, EPS)
        norm.rms_backward(y, x, weight, scale)
    assert [start.kernel.__name__ for start in launches] == 2 * ["norm_forward", "norm_backward"]
    assert (out.shape, rstd.shape, scale.shape, dweight.shape) == (x.shape, (10000, 3), (10000, 1), (96,))


def test_what_the_kernels_cannot_hold_is_refused():
    with pytest.raises(BackendError, match="bfloat16 and float32, not float64"):
        rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.ones(3), EPS, backend="triton")
    with pytest.raises(BackendError, match="norm up to 16384 channels together, not 20000"):
        rms_norm(torch.ones(1, 20000), torch.ones(20000), EPS, backend="triton")
