"""Gradients of one process: measured and clipped."""

import pytest
import torch

from nemohybrid.parallel.context import Group
from nemohybrid.parallel.gradients import clip_gradients, gradient_norm, sum_gradients


@pytest.fixture
def parameters():
    """Three with gradients of very different size, one without."""
    generator = torch.Generator().manual_seed(0)
    result = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (3,), (2, 2, 2), (4,))]
    for parameter, size in zip(result[:3], (1e-3, 10.0, 1.0), strict=True):
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    return result


def norm_by_hand(parameters) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm()


def test_the_norm_is_that_of_all_gradients_joined(parameters):
    norm = gradient_norm(parameters)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    torch.testing.assert_close(norm.double(), norm_by_hand(parameters), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([p.grad for p in parameters[:3]]))


def test_the_norm_of_no_gradients_is_zero():
    assert gradient_norm([torch.nn.Parameter(torch.zeros(2))]) == 0


def test_one_bad_number_shows_in_the_norm(parameters):
    parameters[2].grad[0, 1, 0] = torch.nan
    assert gradient_norm(parameters).isnan()


def test_clipping_scales_all_gradients_alike(parameters):
    before = [p.grad.clone() for p in parameters[:3]]
    norm = gradient_norm(parameters)
    clip_gradients(parameters, norm, 0.5)
    torch.testing.assert_close(norm_by_hand(parameters).item(), 0.5, rtol=1e-5, atol=0)
    for parameter, old in zip(parameters[:3], before, strict=True):
        torch.testing.assert_close(parameter.grad, old * (0.5 / norm), rtol=1e-5, atol=0)
    assert parameters[3].grad is None


def test_gradients_below_the_limit_stay_as_they_are_bit_by_bit(parameters):
    before = [p.grad.clone() for p in parameters[:3]]
    clip_gradients(parameters, gradient_norm(parameters), 1e4)
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters[:3], before, strict=True))


def test_a_group_of_one_leaves_gradients_alone(parameters):
    before = [p.grad.clone() for p in parameters[:3]]
    sum_gradients(parameters, Group())
    assert all(torch.equal(p.grad, old) for p, old in zip(parameters[:3], before, strict=True))
    assert parameters[3].grad is None


def test_the_norm_of_many_elements_is_not_their_rounding():
    """torch's own norm of 30 million fp32 elements on a CPU is 2e-3 off, so that clipping would depend on the layout."""
    parameter = torch.nn.Parameter(torch.zeros(5000, 6000))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradient_norm([parameter]).double(), parameter.grad.double().norm(), rtol=5e-6, atol=0)
