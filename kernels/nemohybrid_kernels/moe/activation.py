"""What happens between the two products of an expert: the activation, weighted by the router."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
        with torch.enable_grad():
            leaf = up_part.detach().requires_grad_()
            activated = activation(leaf)
        torch.sum(gradient.to(w.dtype) * activated.detach(), dim=1, keepdim=True, out=d_w)
        d_part.copy_(torch.autograd.grad(activated, leaf, gradient.mul_(w))[0])
        torch.mul(activated.detach(), w, out=gradient)
    return d_up_out, d_weights


def _in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors, few enough that what is made in passing is small: on a CPU it stays in the cache."""
    elements = 2**17 if tensors[0].device.type == "cpu" else 2**25
    rows = max(1, elements // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
