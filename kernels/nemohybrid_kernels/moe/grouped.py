"""The experts of a mixture in six products for all experts together, keeping little for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.moe.activation import Activation
from nemohybrid_kernels.moe.passes import TORCH, Passes
from nemohybrid_kernels.moe.products import Pair, Products, products_for
from nemohybrid_kernels.moe.visits import Visits, sort_by_expert

# T tokens, D hidden, K experts of a token, n = T*K visits, E experts, F width of an expert


def expert_mlp_grouped(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Activation,
    products: Products | Pair | None = None,
    absent: bool = False,
    passes: Passes = TORCH,
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.moe.expert_mlp`; twin: `reference.expert_mlp_torch`.

    `products` None: what `products_for` finds; on GPUs nothing then waits for the host. A `Pair` has others for each matrix.

    Kept for the backward pass besides the arguments: what `up` returned, [n, F] (2F when gated), and the order of the
    visits. Sorted rows, activation and casts of the matrices are made again; nothing of the experts' outputs is kept,
    because the router's weight acts before `down` (Megatron-Core MoE, arXiv 2603.07685).
    """
    if products is None:
        products = products_for(x.dtype, (x.shape[1], up.shape[1], down.shape[2]), x.device)
    visits = sort_by_expert(expert_ids, len(up), absent)
    pair = products if isinstance(products, Pair) else Pair(products, products)
    return _Experts.apply(x, expert_weights, up, down, visits, activation, pair, passes)  # pyright: ignore[reportReturnType]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights_TK: Tensor,
        up: Tensor,
        down: Tensor,
        visits: Visits,
        activation: Activation,
        products: Pair,
        passes: Passes,
    ) -> Tensor:
        up_out = products.up.rows(passes.permute(x, visits), up.to(x.dtype).mT, visits)
        hidden = passes.activate(up_out, weights_TK, visits, activation, down.shape[2])
        ctx.save_for_backward(x, weights_TK, up, down, up_out, visits.order, visits.place, visits.ends)
        ctx.activation, ctx.products, ctx.passes, ctx.absent = activation, products, passes, visits.absent
        return passes.unpermute(products.down.rows(hidden, down.to(x.dtype).mT, visits), visits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights_TK, up, down, up_out, order, place, ends = ctx.saved_tensors
        visits, products = Visits(order, place, ends, weights_TK.shape[1], ctx.absent), ctx.products
        passes, activation = ctx.passes, ctx.activation
        d_out = passes.permute(grads[0], visits)
        hidden = products.down.gradients(d_out, down.to(x.dtype), visits)  # its gradient, until the next line
        d_up_out, d_weights = passes.activate_backward(up_out, weights_TK, hidden, visits, activation)
        d_down = products.down.matrices(d_out, hidden, visits).to(down.dtype)
        del d_out, hidden  # here a step needs most memory
        d_up = products.up.matrices(d_up_out, passes.permute(x, visits), visits).to(up.dtype)
        d_x = passes.unpermute(products.up.gradients(d_up_out, up.to(x.dtype), visits), visits)
        return d_x, d_weights, d_up, d_down, None, None, None, None
