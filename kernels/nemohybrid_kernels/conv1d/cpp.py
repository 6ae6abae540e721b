"""The short causal convolution with its SiLU in C++, one pass each way. Twin of `reference.causal_conv1d_torch`.

Before the activation p_t = bias + sum_k w_k x_{t-(K-1)+k}; on the way back dp = dy silu'(p), dx_s = sum_k w_k dp_{s+(K-1)-k},
dw_k = sum_t dp_t x_{t-(K-1)+k}, over the pairs of one document.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch
from nemohybrid_kernels.cpp import call, threads
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.opaque import opaque

WIDEST = 16
"""`WIDEST` of conv1d.cpp."""


def causal_conv1d_cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `nemohybrid_kernels.conv1d.causal_conv1d`, for bf16 and fp32 on a CPU.

    Kernels of more than WIDEST taps go to the twin.
    """
    if weight.shape[1] > WIDEST:
        past: dict[str, Any] = {"document_ids": document_ids, "initial_state": initial_state}
        return causal_conv1d_torch(x, weight, bias, activation=activation, **past)
    starts = None if document_ids is None else document_starts(document_ids)
    history = None if initial_state is None else initial_state.to(x.dtype)
    y = _Conv.apply(x, weight, bias, history, starts, activation == "silu")
    return y, _last_inputs(x, weight.shape[1] - 1, history, starts)  # pyright: ignore[reportReturnType]


def _last_inputs(x: Tensor, taps: int, history: Tensor | None, starts: Tensor | None) -> Tensor:
    """The last `taps` inputs, zeros where the last document had not begun."""
    L = x.shape[1]
    if taps <= L:
        last = x[:, L - taps :].clone()
    else:
        last = F.pad(x, (0, 0, taps - L, 0)) if history is None else torch.cat([history[:, L:], x], dim=1)
    if starts is None:
        return last
    outside = torch.arange(L - taps, L, device=x.device) < starts[:, -1:]
    return last.masked_fill(outside.unsqueeze(-1), 0.0)


class _Conv(torch.autograd.Function):
    """Keeps its inputs, and computes what enters the activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        history: Tensor | None,
        starts: Tensor | None,
        silu: bool,
    ) -> Tensor:
        x, history = _rows(x), None if history is None else history.contiguous()
        y = forward(x, weight, bias, history, starts, silu)
        ctx.save_for_backward(x, weight, bias, history, starts)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        gradients = _backward(grads[0], *saved, ctx.silu)
        wanted = (None if t is None else d for d, t in zip(gradients, saved, strict=False))
        return *wanted, None, None


def _like(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@opaque("cpp_conv1d", like=_like)
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, starts: Tensor | None, silu: bool
) -> Tensor:
    """[B, L, C], whose channels are neighbours, convolved."""
    (B, L, C), K = x.shape, weight.shape[1]
    w, b, y = _taps_first(weight), _bias(bias, weight), x.new_empty(B, L, C)
    call("conv1d_forward", x, x, *x.stride()[:2], history, starts, w, b, y, B, L, C, K, silu, threads())
    return y


def _like_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(weight.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, history))


@opaque("cpp_conv1d_backward", like=_like_gradients)
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    starts: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d of x, weight, bias and history; empty for what is None."""
    dx, dhistory = x.new_empty(x.shape), None if history is None else torch.empty_like(history)
    dw, dbias = backward(_rows(dy), x, weight, bias, history, starts, silu, dx, dhistory)
    dbias, dhistory = (weight.new_empty(0) if t is None else t for t in (dbias, dhistory))
    return dx, dw.contiguous(), dbias, dhistory


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    starts: Tensor | None,
    silu: bool,
    dx: Tensor,
    dhistory: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """d of weight and bias. dx, which may be part of wider rows, and dhistory are filled."""
    (B, L, C), K = x.shape, weight.shape[1]
    w, b = _taps_first(weight), _bias(bias, weight)
    dw, dbias = torch.empty_like(w), torch.empty_like(b)
    inputs = (x, *x.stride()[:2], history, starts, w, b, dy, *dy.stride()[:2])
    results = (dx, *dx.stride()[:2], dhistory, dw, dbias)
    call("conv1d_backward", x, *inputs, *results, B, L, C, K, silu, threads())
    return dw.T.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _rows(x: Tensor) -> Tensor:
    """[B, L, C] with neighbouring channels."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _taps_first(weight_CK: Tensor) -> Tensor:
    return weight_CK.detach().float().T.contiguous()


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    like = {"dtype": torch.float32, "device": weight.device}
    return torch.zeros(len(weight), **like) if bias is None else bias.detach().float().contiguous()
