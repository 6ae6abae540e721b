import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels.moe import expert_mlp


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


def both(inputs, activation, results_and_gradients):
    got = results_and_gradients(lambda **i: (expert_mlp(**i, activation=activation),), inputs)
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return got, results_and_gradients(lambda **i: moe_oracle(**i, activation=activation), doubles)


@pytest.mark.parametrize("activation", [squared_relu, gated_silu])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_values_and_all_gradients_equal_the_dense_oracle(
    dtype, tolerance, K, activation, assert_same, results_and_gradients
):
    inputs = moe_inputs(K=K, dtype=dtype, gated=activation is gated_silu)
    got, want = both(inputs, activation, results_and_gradients)
    assert got["out0"].dtype == dtype
    assert_same(got, want, tolerance)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(T=st.integers(0, 9), E=st.integers(1, 6), K=st.integers(1, 6), D=st.integers(1, 5))
def test_any_shape_equals_the_dense_oracle(T, E, K, D, assert_same, results_and_gradients):
    K = min(K, E)
    assert_same(*both(moe_inputs(T, D, E, K=K), squared_relu, results_and_gradients), 1e-12)


def test_experts_without_tokens_get_zero_gradients(results_and_gradients):
    got = results_and_gradients(lambda **i: (expert_mlp(**i, activation=squared_relu),), moe_inputs())
    for name in ("d_up", "d_down"):
        assert got[name][:-1].abs().amax((1, 2)).min() > 0, f"{name}: an expert that worked learns nothing"
        assert got[name][-1].abs().max() == 0, f"{name}: an expert that did nothing learns"


def test_no_tokens_at_all_give_zero_gradients_for_every_parameter(results_and_gradients):
    got = results_and_gradients(lambda **i: (expert_mlp(**i, activation=squared_relu),), moe_inputs(T=0))
    assert got["out0"].shape == (0, 8)
    for name in ("d_up", "d_down"):
        assert got[name].abs().max() == 0, f"{name} is not zero without tokens"


def test_the_handwritten_backward_passes_gradcheck():
    inputs = moe_inputs(T=4, D=3, E=3, width=2)
    ids = inputs.pop("expert_ids")
    tensors = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda x, w, up, down: expert_mlp(x, ids, w, up, down, activation=lambda h: F.silu(h) * h), tensors
    )


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = moe_inputs(T=200, D=32, E=8, width=16, K=4, dtype=torch.bfloat16)
    first, second = (
        results_and_gradients(lambda **i: (expert_mlp(**i, activation=squared_relu),), inputs) for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"
