"""The experts with Triton between the products: launchers on plain tensors, operators, and the passes made of them.

Nothing here waits for the device or reads a tensor, so it can be captured in a graph, and run on the meta device where
launches are recorded. T tokens, K experts of a token, n = T*K visits, D columns, F width of an expert.
"""

import torch
from torch import Tensor

from nemohybrid_kernels.activation import is_squared_relu
from nemohybrid_kernels.activation import triton as relu2
from nemohybrid_kernels.activation.triton import Weights, by_elements, flat_rows
from nemohybrid_kernels.launching import Config, config_for, dtype_fact, launch
from nemohybrid_kernels.moe import passes, products, triton_kernels
from nemohybrid_kernels.moe.activation import Activation
from nemohybrid_kernels.moe.grouped import expert_mlp_grouped
from nemohybrid_kernels.moe.passes import Passes
from nemohybrid_kernels.moe.products import SEGMENTS, Pair, Products
from nemohybrid_kernels.moe.visits import Visits


def expert_mlp_triton(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Activation,
    products: Products | Pair | None = None,
    absent: bool = False,
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.moe.expert_mlp`; twin: `reference.expert_mlp_torch`.

    Keeps what `expert_mlp_grouped` keeps. On GPUs that grouped_mm does not serve, the products wait for the host.
    """
    products = _products(x, up, down) if products is None else products
    how = {"activation": activation, "products": products, "absent": absent, "passes": TRITON}
    return expert_mlp_grouped(x, expert_ids, expert_weights, up, down, **how)


def _products(x: Tensor, up: Tensor, down: Tensor) -> Products:
    widths = x.shape[1], up.shape[1], down.shape[2]
    if x.device.type == "cuda" and products.obstacle(x.dtype, widths, x.device) is not None:
        return SEGMENTS
    return products.products_for(x.dtype, widths, x.device)


def permute(x: Tensor, order: Tensor, end: Tensor | None, copies: int) -> Tensor:
    """x [T, D] -> [n, D]: row i is that of token order[i] // copies. From `end` on, one number, rows stay unwritten."""
    rows = flat_rows(x)
    config, out = _config("moe_permute", rows), x.new_empty(len(order), x.shape[1])
    launch(
        triton_kernels.moe_permute,
        (-(-len(order) // config.tiles["ROWS"]),),
        config,
        x=rows,
        order=order,
        end=end,
        out=out,
        n=len(order),
        D=x.shape[1],
        copies=copies,
        x_stride=rows.stride(0),
    )
    return out


def unpermute(rows: Tensor, place: Tensor, end: Tensor | None, copies: int) -> Tensor:
    """rows [n, D] -> [T, D]: the sum of the `copies` rows of each token, in fp32, rounded once; without those from `end` on."""
    rows = flat_rows(rows)
    T, D = len(place) // copies, rows.shape[1]
    config, out = _config("moe_unpermute", rows), rows.new_empty(T, D)
    launch(
        triton_kernels.moe_unpermute,
        (-(-T // config.tiles["ROWS"]),),
        config,
        rows=rows,
        place=place,
        end=end,
        out=out,
        T=T,
        D=D,
        rows_stride=rows.stride(0),
        COPIES=copies,
    )
    return out


def _config(kernel: str, rows: Tensor) -> Config:
    return by_elements(config_for(kernel, rows.device, dtype=dtype_fact(rows)), rows.shape[1])


@torch.library.custom_op("nemohybrid::moe_permute", mutates_args=())
def _permute(x: Tensor, order: Tensor, end: Tensor | None, copies: int) -> Tensor:
    return permute(x, order, end, copies)


@torch.library.custom_op("nemohybrid::moe_unpermute", mutates_args=())
def _unpermute(rows: Tensor, place: Tensor, end: Tensor | None, copies: int) -> Tensor:
    return unpermute(rows, place, end, copies)


@torch.library.custom_op("nemohybrid::moe_relu2", mutates_args=())
def _relu2(up_out: Tensor, weights: Tensor, order: Tensor, end: Tensor | None) -> Tensor:
    return relu2.forward(up_out, Weights(weights, order, end))


@torch.library.custom_op("nemohybrid::moe_relu2_backward", mutates_args=("hidden",))
def _relu2_backward(
    hidden: Tensor, up_out: Tensor, weights: Tensor, order: Tensor, end: Tensor | None
) -> tuple[Tensor, Tensor]:
    return relu2.weighted_backward(hidden, up_out, Weights(weights, order, end))


@_permute.register_fake
def _(x: Tensor, order: Tensor, end: Tensor | None, copies: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@_unpermute.register_fake
def _(rows: Tensor, place: Tensor, end: Tensor | None, copies: int) -> Tensor:
    return rows.new_empty(place.shape[0] // copies, rows.shape[1])


@_relu2.register_fake
def _(up_out: Tensor, weights: Tensor, order: Tensor, end: Tensor | None) -> Tensor:
    return up_out.new_empty(up_out.shape)


@_relu2_backward.register_fake
def _(hidden: Tensor, up_out: Tensor, weights: Tensor, order: Tensor, end: Tensor | None) -> tuple[Tensor, Tensor]:
    return up_out.new_empty(up_out.shape), torch.empty_like(weights)


def _permuted(x: Tensor, visits: Visits) -> Tensor:
    return _permute(x, visits.order, visits.end, visits.per_token)


def _unpermuted(rows: Tensor, visits: Visits) -> Tensor:
    return _unpermute(rows, visits.place, visits.end, visits.per_token)


def _activated(up_out: Tensor, weights: Tensor, visits: Visits, activation: Activation, width: int) -> Tensor:
    if not is_squared_relu(activation):
        return passes.activate_rows(up_out, weights, visits, activation, width)
    return _relu2(up_out, _in_a_row(weights), visits.order, visits.end)


def _activated_backward(
    up_out: Tensor, weights: Tensor, hidden: Tensor, visits: Visits, activation: Activation
) -> tuple[Tensor, Tensor]:
    if not is_squared_relu(activation):
        return passes.activate_rows_backward(up_out, weights, hidden, visits, activation)
    d_up_out, d_weights = _relu2_backward(hidden, up_out, _in_a_row(weights), visits.order, visits.end)
    return d_up_out, d_weights.view_as(weights)


def _in_a_row(weights: Tensor) -> Tensor:
    """[T, K] -> [n], one behind the other in memory, which `flatten` alone leaves open."""
    return weights.flatten().contiguous()


TRITON = Passes(_permuted, _unpermuted, _activated, _activated_backward)
"""Squared ReLU, if it is that of `nemohybrid_kernels.activation`, in one pass each way; other activations as in PyTorch."""
