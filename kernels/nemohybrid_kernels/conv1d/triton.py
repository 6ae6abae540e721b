"""The causal convolution in Triton: launchers on plain tensors, and two custom operators made of them.

Nothing here waits for the device or reads a tensor, so it can be captured in a graph, and run on the meta device where
launches are recorded.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemohybrid_kernels.conv1d import triton_kernels
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.launching import Config, config_for, dtype_fact, launch

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4096, 2048
"""Programs, of one warp each, to cut a call into: what fits onto some 130 multiprocessors at once. More programs of the
backward kernel are also more shares of the weight's gradient to write and to add up."""

SHORTEST_SPAN = 32
"""Tokens of a program, or the K-1 before and behind them, which it reads too, cost more than they bring."""


class Gradients(NamedTuple):
    """Of x, in its type; of weight and bias, in fp32; of the initial state, if there is one."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    initial: Tensor | None


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `nemohybrid_kernels.conv1d.causal_conv1d`; twin: `reference.causal_conv1d_torch`.

    For the backward pass nothing is kept but the arguments.
    """
    starts = None if document_ids is None else document_starts(document_ids)
    initial = None if initial_state is None else initial_state.to(x.dtype)
    y = _conv(x, weight, bias, starts, initial, activation == "silu")
    return y, final_state(x, starts, initial, weight.shape[1] - 1)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    y: Tensor | None = None,
) -> Tensor:
    """y [B, L, C], or into the `y` given. x, y may be columns of wider rows; starts [B, L] as of `document_starts`."""
    (B, L, C), K = x.shape, weight.shape[1]
    x = _unit_stride(x)
    y = x.new_empty(B, L, C) if y is None else y
    config = _config("conv1d_forward", x, K)
    cut = _cut(x, config, FORWARD_PROGRAMS)
    launch(
        triton_kernels.conv1d_forward,
        (B * cut["spans"] * cut["strips"],),
        config,
        x=x,
        weight=weight.contiguous(),
        bias=_contiguous(bias),
        starts=starts,
        initial=_contiguous(initial_state),
        y=y,
        L=L,
        C=C,
        **cut,
        **_strides(x=x, y=y),
        K=K,
        SILU=silu,
    )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    dx: Tensor | None = None,
) -> Gradients:
    """Gradients of all inputs, dx into the one given, which may be columns of wider rows."""
    (B, L, C), K = x.shape, weight.shape[1]
    dy, x = _unit_stride(dy), _unit_stride(x)
    dx = x.new_empty(B, L, C) if dx is None else dx
    d_initial = (
        None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    )
    config = _config("conv1d_backward", x, K)
    cut = _cut(x, config, BACKWARD_PROGRAMS)
    shares = x.new_empty(B * cut["spans"], K + 1, C, dtype=torch.float32)
    launch(
        triton_kernels.conv1d_backward,
        (B * cut["spans"] * cut["strips"],),
        config,
        dy=dy,
        x=x,
        weight=weight.contiguous(),
        bias=_contiguous(bias),
        starts=starts,
        initial=_contiguous(initial_state),
        dx=dx,
        d_initial=d_initial,
        partial=shares,
        L=L,
        C=C,
        **cut,
        **_strides(dy=dy, x=x, dx=dx),
        K=K,
        SILU=silu,
    )
    sums = shares.sum(0)
    return Gradients(dx, sums[:K].t().contiguous(), sums[K].clone(), d_initial)


def final_state(x: Tensor, starts: Tensor | None, initial_state: Tensor | None, taps: int) -> Tensor:
    """The last `taps` inputs [B, taps, C], of the last document: zeros stand for those outside it."""
    B, L, C = x.shape
    recent = x[:, max(L - taps, 0) :]
    if taps > L:
        before = x.new_zeros(B, taps, C) if initial_state is None else initial_state
        recent = torch.cat([before[:, L:], recent], dim=1)
    if starts is None:
        return recent.clone(memory_format=torch.contiguous_format)
    visible = torch.arange(L - taps, L, device=x.device) >= starts[:, -1:]
    return torch.where(visible.unsqueeze(-1), recent, 0.0)


def _config(kernel: str, x: Tensor, K: int) -> Config:
    return config_for(kernel, x.device, K=K, dtype=dtype_fact(x))


def _cut(x: Tensor, config: Config, programs: int) -> dict[str, int]:
    """How tokens are cut into spans, of whole steps, and channels into strips, to give about as many `programs`."""
    (B, L, C), step = x.shape, config.tiles["UNROLL"]
    strips = -(-C // config.tiles["BLOCK_C"])
    span = -(-max(SHORTEST_SPAN, B * L * strips // programs) // step) * step
    return {"span": span, "spans": -(-L // span), "strips": strips}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Of batch rows and of tokens: NAME_stride_b, NAME_stride_l."""
    named = {f"{name}_stride_b": tensor.stride(0) for name, tensor in tensors.items()}
    return named | {f"{name}_stride_l": tensor.stride(1) for name, tensor in tensors.items()}


def _unit_stride(t: Tensor) -> Tensor:
    """Kernels want the last dimension contiguous, and copy nothing else."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@torch.library.custom_op("nemohybrid::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    return forward(x, weight, bias, starts, initial_state, silu)


@_conv.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("nemohybrid::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameters' gradients in fp32. Without an initial state the last result is empty: an operator returns no None."""
    got = backward(dy, x, weight, bias, starts, initial_state, silu)
    return got.x, got.weight, got.bias, x.new_empty(0) if got.initial is None else got.initial


@_conv_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_initial = x.new_empty(0) if initial_state is None else x.new_empty(initial_state.shape)
    dweight, dbias = (x.new_empty(shape, dtype=torch.float32) for shape in (weight.shape, weight.shape[:1]))
    return x.new_empty(x.shape), dweight, dbias, d_initial


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, starts, initial = ctx.saved_tensors
    dx, dweight, dbias, d_initial = _conv_backward(dy, x, weight, bias, starts, initial, ctx.silu)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, None, None if initial is None else d_initial, None


_conv.register_autograd(_gradients, setup_context=_keep)
