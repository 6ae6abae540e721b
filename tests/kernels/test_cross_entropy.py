import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid_kernels.cross_entropy import cross_entropy
from nemohybrid_kernels.cross_entropy import reference as cross_entropy_reference


def loss_inputs(T=50, V=300, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(T, V, generator=g, dtype=torch.float64)
    return {"logits": logits.to(dtype), "labels": torch.randint(0, V, (T,), generator=g)}


def loss_oracle(logits, labels):
    p = torch.softmax(logits.double(), -1)
    return (-torch.log(p[torch.arange(len(labels)), labels]),)


def run(logits, labels):
    return (cross_entropy(logits, labels),)


@pytest.mark.parametrize(
    "dtype, of_value, of_gradient",
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-6, 1e-6),
        (torch.bfloat16, 1e-6, 4e-3),  # computed in fp32; the gradient is rounded once, to bf16
        (torch.float16, 1e-6, 5e-4),
    ],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("block", [2**18, 1000, 1], ids=["one block", "blocks of 3", "blocks of 1"])
def test_value_and_gradient_equal_the_formula(
    block, dtype, of_value, of_gradient, monkeypatch, assert_same, results_and_gradients
):
    monkeypatch.setattr(cross_entropy_reference, "_BLOCK_CPU", block)
    inputs = loss_inputs(dtype=dtype)
    got = results_and_gradients(run, inputs)
    want = results_and_gradients(loss_oracle, inputs | {"logits": inputs["logits"].double()})
    assert got["out0"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same({"out0": got["out0"]}, {"out0": want["out0"]}, of_value)
    assert_same({"d": got["d_logits"]}, {"d": want["d_logits"]}, of_gradient)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(T=st.integers(0, 6), V=st.integers(1, 9))
def test_any_shape_equals_the_formula(T, V, assert_same, results_and_gradients):
    inputs = loss_inputs(T, V)
    got, want = results_and_gradients(run, inputs), results_and_gradients(loss_oracle, inputs)
    for name, tensor in got.items():
        assert torch.allclose(tensor, want[name], rtol=1e-12, atol=1e-12), f"{name} is off"


def test_the_handwritten_backward_passes_gradcheck():
    inputs = loss_inputs(T=4, V=6)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, inputs["labels"]), inputs["logits"].requires_grad_())


def test_huge_logits_neither_overflow_nor_lose_the_loss(results_and_gradients):
    inputs = {"logits": torch.tensor([[3e38, 0.0], [-3e38, 1.0]]), "labels": torch.tensor([0, 1])}
    got = results_and_gradients(run, inputs)
    assert torch.equal(got["out0"], torch.zeros(2))
    assert got["d_logits"].isfinite().all()


def test_nothing_but_the_logits_is_kept_for_the_backward():
    inputs = loss_inputs(dtype=torch.bfloat16)
    inputs["logits"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(**inputs).sum()
    assert {t.data_ptr() for t in kept} == {inputs["logits"].data_ptr(), inputs["labels"].data_ptr()}


def test_two_runs_are_equal_bit_by_bit(results_and_gradients):
    inputs = loss_inputs(200, 4000, torch.bfloat16)
    first, second = results_and_gradients(run, inputs), results_and_gradients(run, inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"
