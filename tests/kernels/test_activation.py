"""Squared ReLU through its face: each backend against the twin in float64, and which one is taken where."""

from functools import partial

import pytest
import torch

from nemohybrid_kernels import activation, launching
from nemohybrid_kernels.activation import is_squared_relu, squared_relu, squared_relu_torch
from nemohybrid_kernels.backend import choose, decide
from nemohybrid_kernels.errors import BackendError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"]
)


@pytest.fixture(params=["triton", "torch"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def numbers(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Half of them positive, one zero."""
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    h[..., 0] = 0.0
    return h.to(dtype)


def on_device(run):
    return lambda h: (run(h.to(DEVICE)).cpu(),)


@DTYPES
def test_value_and_gradient_equal_the_twin_in_double(backend, dtype, tolerance, assert_same, results_and_gradients):
    inputs = {"h": numbers(3, 7, 150, dtype=dtype)}
    got = results_and_gradients(on_device(partial(squared_relu, backend=backend)), inputs)
    want = results_and_gradients(lambda h: (squared_relu_torch(h),), {"h": inputs["h"].double()})
    assert got["out0"].dtype == got["d_h"].dtype == dtype
    assert_same(got, want, tolerance)


def test_a_part_of_wider_rows_and_a_gradient_without_memory_of_its_own(backend, assert_same, results_and_gradients):
    """As a split leaves the one, and `sum` the other."""

    def total(run):
        return on_device(lambda wide: run(wide[..., 3:20]).sum())

    inputs = {"h": numbers(5, 24)}
    got = results_and_gradients(total(partial(squared_relu, backend=backend)), inputs)
    assert_same(got, results_and_gradients(total(squared_relu_torch), inputs), 1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
def test_it_is_one_graph(backend, assert_same, results_and_gradients):
    run, inputs = on_device(partial(squared_relu, backend=backend)), {"h": numbers(4, 24)}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(run, inputs), 1e-6)


def test_triton_is_the_first_choice_on_gpus_and_none_on_cpus(monkeypatch):
    monkeypatch.setattr(launching, "TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    possible = activation.backends(torch.bfloat16)
    assert [*possible] == ["triton", "cpp", "torch"]
    assert str(decide("squared_relu", "auto", possible, CUDA)) == "squared_relu: triton (auto)"
    assert "not triton: the interpreter is for tests" in decide("squared_relu", "auto", possible, CPU).why
    assert choose("squared_relu", "auto", activation.backends(torch.float16), CUDA) is squared_relu_torch


def test_what_triton_cannot_do_is_refused():
    with pytest.raises(BackendError, match="bfloat16 and float32, not float64"):
        squared_relu(numbers(2, 3).double(), backend="triton")


def test_experts_know_it_with_a_backend_of_its_own_too():
    assert is_squared_relu(squared_relu)
    assert is_squared_relu(partial(squared_relu, backend="torch"))
    assert not is_squared_relu(squared_relu_torch)
    assert not is_squared_relu(partial(torch.pow, exponent=2))
