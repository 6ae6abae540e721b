import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels.norm import gated_rms_norm, rms_norm

EPS = 1e-5
PRECISIONS = pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)],
    ids=["fp64", "fp32", "bf16"],
)


def norm_inputs(rows=7, D=24, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(rows, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(D, generator=g, dtype=torch.float64)
    return {"x": x, "z": z, "weight": weight if dtype == torch.float64 else weight.float()}


def rms_oracle(x, weight, eps=EPS):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight,)


def gated_oracle(x, z, weight, group_size):
    gated = x * z * torch.sigmoid(z)
    groups = [rms_oracle(g, w)[0] for g, w in zip(gated.split(group_size, -1), weight.split(group_size), strict=True)]
    return (torch.cat(groups, dim=-1),)


def in_double(inputs):
    return {k: v.double() for k, v in inputs.items()}


@PRECISIONS
def test_rms_norm_and_its_gradients_equal_the_formula(dtype, tolerance, assert_same, results_and_gradients):
    inputs = {k: v for k, v in norm_inputs(dtype=dtype).items() if k != "z"}
    got = results_and_gradients(lambda x, weight: (rms_norm(x, weight, EPS),), inputs)
    assert got["out0"].dtype == dtype
    assert_same(got, results_and_gradients(rms_oracle, in_double(inputs)), tolerance)


@PRECISIONS
@pytest.mark.parametrize("group_size", [24, 6, 1])
def test_gated_norm_and_its_gradients_equal_the_formula(
    group_size, dtype, tolerance, assert_same, results_and_gradients
):
    inputs = norm_inputs(dtype=dtype)
    got = results_and_gradients(lambda **i: (gated_rms_norm(**i, group_size=group_size, eps=EPS),), inputs)
    want = results_and_gradients(lambda **i: gated_oracle(**i, group_size=group_size), in_double(inputs))
    assert got["out0"].dtype == dtype
    assert_same(got, want, tolerance if group_size > 1 else max(tolerance, 5e-5))  # of one channel little is left


@settings(max_examples=25, derandomize=True, deadline=None)
@given(rows=st.integers(0, 5), groups=st.integers(1, 4), size=st.integers(1, 9))
def test_any_shape_equals_the_formula(rows, groups, size, assert_same, results_and_gradients):
    inputs = norm_inputs(rows, groups * size)
    got = results_and_gradients(lambda **i: (gated_rms_norm(**i, group_size=size, eps=EPS),), inputs)
    assert_same(got, results_and_gradients(lambda **i: gated_oracle(**i, group_size=size), inputs), 1e-9)


def test_the_handwritten_backward_passes_gradcheck():
    x, z, weight = (t.requires_grad_() for t in norm_inputs(3, 8).values())
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, z, w: gated_rms_norm(x, z, w, group_size=4, eps=EPS), (x, z, weight))


def test_rows_of_zeros_stay_zero_with_finite_gradients(results_and_gradients):
    inputs = {"x": torch.zeros(2, 8), "weight": torch.ones(8)}
    for name, tensor in results_and_gradients(lambda x, weight: (rms_norm(x, weight, EPS),), inputs).items():
        assert tensor.isfinite().all(), f"{name} is not finite for a row of zeros"


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = norm_inputs(64, 96, torch.bfloat16)

    def run(**i):
        return (gated_rms_norm(**i, group_size=32, eps=EPS),)

    first, second = results_and_gradients(run, inputs), results_and_gradients(run, inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"
