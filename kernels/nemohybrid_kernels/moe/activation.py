"""What happens between the two products of an expert: the activation, weighted by the router."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels.activation import is_squared_relu, swiglu

# n rows of visits, F width of an expert

Activation = Callable[[Tensor], Tensor]


def activate(up_out: Tensor, weights: Tensor, activation: Activation, width: int) -> Tensor:
    """up_out [n, F or 2F], weights [n, 1] -> the weighted activation [n, F]; the product is rounded once."""
    hidden = up_out.new_empty(len(up_out), width)
    for up_part, w, result in _in_pieces(up_out, weights, hidden):
        torch.mul(activation(up_part), w, out=result)
    return hidden


def activate_backward(up_out: Tensor, weights: Tensor, hidden: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The gradients of `up_out` and `weights`. `hidden` comes as the gradient of `activate`'s result and leaves as it."""
    d_up_out, d_weights = torch.empty_like(up_out), torch.empty_like(weights)
    for up_part, w, gradient, d_part, d_w in _in_pieces(up_out, weights, hidden, d_up_out, d_weights):
        activated, pull_back = _differentiated(activation, up_part)
        torch.sum(gradient.to(w.dtype) * activated, dim=1, keepdim=True, out=d_w)
        d_part.copy_(pull_back(gradient.mul_(w)))
        torch.mul(activated, w, out=gradient)
    return d_up_out, d_weights


def _differentiated(activation: Activation, up_out: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The activation, and what takes its gradient to that of `up_out`."""
    if torch.compiler.is_compiling():  # it cannot look into `autograd.grad`
        return _by_formula(activation, up_out)
    with torch.enable_grad():
        leaf = up_out.detach().requires_grad_()
        activated = activation(leaf)
    return activated.detach(), lambda gradient: torch.autograd.grad(activated, leaf, gradient)[0]


def _by_formula(activation: Activation, up_out: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same, for activations of others by `vjp`; with that, layers in a graph cannot be computed again by `checkpoint`."""
    if is_squared_relu(activation):
        positive = F.relu(up_out)
        return positive.square(), lambda gradient: gradient * (2 * positive)
    if activation is swiglu:
        gate, up = up_out.chunk(2, dim=-1)
        gated, slope = F.silu(gate), torch.ops.aten.silu_backward
        return gated * up, lambda gradient: torch.cat([slope(gradient * up, gate), gradient * gated], dim=-1)
    activated, pull_back = torch.func.vjp(activation, up_out)  # pyright: ignore[reportAssignmentType]
    return activated, lambda gradient: pull_back(gradient)[0]


def _in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, few enough that what is made in passing is small: on a CPU it stays in the cache.

    torch.compile makes nothing in passing, and gets all.
    """
    if torch.compiler.is_compiling():
        return iter((tensors,))
    elements = 2**17 if tensors[0].device.type == "cpu" else 2**25
    rows = max(1, elements // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
