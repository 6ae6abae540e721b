"""What an expert layer does with rows besides products: send them to the experts and back, and activate them between."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from nemohybrid_kernels.moe.activation import Activation, activate, activate_backward
from nemohybrid_kernels.moe.visits import Visits, by_visit, sum_by_token

# T tokens, D hidden, K experts of a token, n = T*K visits, F width of an expert


class Passes(NamedTuple):
    """All return new tensors of the rows' type. Rows of nobody may hold anything, before and after."""

    permute: Callable[[Tensor, Visits], Tensor]
    """x [T, D] -> [n, D]: each token's row to the places of its visits."""
    unpermute: Callable[[Tensor, Visits], Tensor]
    """rows [n, D] -> [T, D]: the sum of each token's rows, without those of nobody, rounded once."""
    activate: Callable[[Tensor, Tensor, Visits, Activation, int], Tensor]
    """What `up` returned [n, F or 2F], weights [T, K] -> the activation times the weight of its visit, [n, F]."""
    activate_backward: Callable[[Tensor, Tensor, Tensor, Visits, Activation], tuple[Tensor, Tensor]]
    """What `up` returned, weights [T, K] -> the gradients of both. The third argument comes as the gradient of what
    `activate` returned, and leaves as that."""


def permute(x: Tensor, visits: Visits) -> Tensor:
    return x.index_select(0, visits.tokens)


def activate_rows(up_out: Tensor, weights: Tensor, visits: Visits, activation: Activation, width: int) -> Tensor:
    return activate(up_out, visits.by_place(weights), activation, width)


def activate_rows_backward(
    up_out: Tensor, weights: Tensor, hidden: Tensor, visits: Visits, activation: Activation
) -> tuple[Tensor, Tensor]:
    d_up_out, d_weights = activate_backward(up_out, visits.by_place(weights), hidden, activation)
    return d_up_out, by_visit(d_weights, visits).view_as(weights)


TORCH = Passes(permute, sum_by_token, activate_rows, activate_rows_backward)
"""In PyTorch: any type and device."""
