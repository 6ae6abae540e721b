"""Squared ReLU in Triton: launchers on plain tensors, of rows with weights or without, and the operator of those without.

Nothing here waits for the device or reads a tensor, so it can be captured in a graph, and run on the meta device where
launches are recorded. n rows, F columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemohybrid_kernels.activation import triton_kernels
from nemohybrid_kernels.launching import Config, config_for, dtype_fact, launch


class Weights(NamedTuple):
    """What the rows are multiplied by: row i by values[order[i]]. Rows from `end` on, where there is one, do not count."""

    values: Tensor  # [n] fp32
    order: Tensor  # [n] int64
    end: Tensor | None = None  # one number, int32


def squared_relu_triton(h: Tensor) -> Tensor:
    """Argument and result as of `nemohybrid_kernels.activation.squared_relu`; twin: `squared_relu_torch`."""
    return _squared_relu(h)


def forward(x: Tensor, weights: Weights | None = None) -> Tensor:
    """x [..., F], whose rows may be parts of wider ones -> a new tensor like it, contiguous."""
    rows = flat_rows(x)
    values, order, end = weights or (None, None, None)
    config, out = _config("relu2_forward", rows), x.new_empty(x.shape)
    launch(
        triton_kernels.relu2_forward,
        (-(-len(rows) // config.tiles["ROWS"]),),
        config,
        x=rows,
        weights=values,
        order=order,
        end=end,
        out=out,
        n=len(rows),
        F=rows.shape[1],
        x_stride=rows.stride(0),
    )
    return out


def backward(dout: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, without weights."""
    return _backward(flat_rows(dout), x, None, None)


def weighted_backward(dout: Tensor, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights, [n] fp32 in their order. `dout` [n, F] becomes the result of `forward`."""
    d_values = torch.empty_like(weights.values)
    return _backward(dout, x, weights, d_values), d_values


def _backward(dout: Tensor, x: Tensor, weights: Weights | None, d_values: Tensor | None) -> Tensor:
    rows, dx = flat_rows(x), x.new_empty(x.shape)
    values, order, end = weights or (None, None, None)
    config = _config("relu2_backward", rows)
    launch(
        triton_kernels.relu2_backward,
        (-(-len(rows) // config.tiles["ROWS"]),),
        config,
        dout=dout,
        x=rows,
        weights=values,
        order=order,
        end=end,
        dx=dx,
        dweights=d_values,
        n=len(rows),
        F=rows.shape[1],
        dout_stride=dout.stride(0),
        x_stride=rows.stride(0),
    )
    return dx


def flat_rows(t: Tensor) -> Tensor:
    """[..., F] -> [n, F], the last dimension contiguous: a view, wherever one row stride leads to every row."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _config(kernel: str, rows: Tensor) -> Config:
    return by_elements(config_for(kernel, rows.device, dtype=dtype_fact(rows)), rows.shape[1])


def by_elements(found: Config, width: int) -> Config:
    """The table has ELEMENTS of a tile; rows narrower than it share one."""
    elements = found.tiles["ELEMENTS"]
    block = min(elements, 1 << (width - 1).bit_length())
    return Config({"ROWS": elements // block, "BLOCK": block}, found.warps, found.stages)


@torch.library.custom_op("nemohybrid::squared_relu", mutates_args=())
def _squared_relu(h: Tensor) -> Tensor:
    return forward(h)


@torch.library.custom_op("nemohybrid::squared_relu_backward", mutates_args=())
def _squared_relu_backward(dy: Tensor, h: Tensor) -> Tensor:
    return backward(dy, h)


@_squared_relu.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@_squared_relu_backward.register_fake
def _(dy: Tensor, h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    return _squared_relu_backward(dy, *ctx.saved_tensors)


_squared_relu.register_autograd(_gradient, setup_context=_keep)
