"""What the tests of all operators share: a comparison, and gradients of everything by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Results = dict[str, Tensor]


def _assert_same(got: Results, want: Results, tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest entry of the wanted one, and no gradient left out."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].shape == expected.shape, f"{name}: shape {got[name].shape}, expected {expected.shape}"
        error = (got[name].double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        scale = expected.abs().max().item() if expected.numel() else 1.0
        assert error <= tolerance * max(scale, 1e-30), f"{name}: off by {error / max(scale, 1e-30):.1e} of its scale"


def _results_and_gradients(run: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> Results:
    """Outputs out0, out1, ... of run(**inputs) and, under fixed output gradients, d_NAME for every floating input."""
    leaves = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    outputs = run(**leaves)
    generator = torch.Generator().manual_seed(99)
    losses = [(out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum().double() for out in outputs]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(wanted.values()), allow_unused=True)
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient is not None, f"no gradient reaches {name}"
        results[f"d_{name}"] = gradient
    return results


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Results, Results, float], None]:
    return _assert_same


@pytest.fixture(scope="session")
def results_and_gradients() -> Callable[..., Results]:
    return _results_and_gradients
