"""The middle of a Mamba-2 mixer with the C++ kernels, differentiated as a whole. Twin of `reference.mamba2_mixer_torch`.

Each kernel writes its part of the gradient of zxbcdt where it belongs; autograd would put five together, twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.conv1d import cpp as conv
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.mixer.reference import mamba2_mixer_torch
from nemohybrid_kernels.norm import cpp as norm
from nemohybrid_kernels.opaque import opaque
from nemohybrid_kernels.ssd import cpp as ssd
from nemohybrid_kernels.ssd.reference import default_chunk_size


def mamba2_mixer_cpp(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    *,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
    eps: float,
    document_ids: Tensor | None = None,
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.mixer.mamba2_mixer`, for bf16 and fp32 on a CPU."""
    sizes = (heads, groups, state, group_size)
    if conv_weight.shape[1] > conv.WIDEST:
        settings: dict[str, Any] = dict(zip(("heads", "groups", "state", "group_size"), sizes, strict=True))
        settings |= {"eps": eps, "document_ids": document_ids, "dt_limit": dt_limit, "chunk_size": chunk_size}
        return mamba2_mixer_torch(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, **settings)
    P = len(norm_weight) // heads
    Q = min(chunk_size or default_chunk_size(zxbcdt.new_empty(0, P)), zxbcdt.shape[1])
    starts = None if document_ids is None else document_starts(document_ids)
    parameters = (conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    limit = None if dt_limit is None else list(dt_limit)
    return _Mixer.apply(zxbcdt, *parameters, starts, limit, eps, Q, *sizes)  # pyright: ignore[reportReturnType]


class _Mixer(torch.autograd.Function):
    """Keeps its inputs, and of what it makes all but the result."""

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor | None,
        norm_weight: Tensor,
        *rest: Any,
    ) -> Tensor:
        zxbcdt = zxbcdt if zxbcdt.stride(2) == 1 else zxbcdt.contiguous()
        inputs = (zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight)
        out, *made = _forward(*inputs, *rest)
        starts, ctx.limit, _, *ctx.sizes = rest
        ctx.save_for_backward(*inputs, starts, *made)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        inputs, starts, made = saved[:7], saved[7], saved[8:]
        gradients = _backward(grads[0], *inputs, starts, list(made), ctx.limit, *ctx.sizes)
        wanted = (None if t is None else d for d, t in zip(gradients, inputs, strict=True))
        return *wanted, *(None,) * 8


def _like(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    starts: Tensor | None,
    limit: list[float] | None,
    eps: float,
    Q: int,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
) -> list[Tensor]:
    (b, L, _), inner = zxbcdt.shape, len(norm_weight)
    convolved = zxbcdt.new_empty(b, L, inner + 2 * groups * state)
    steps = zxbcdt.new_empty(b, L, heads, dtype=torch.float32)
    x, B, C = _heads(convolved, inner, (heads, groups, state))
    y, _, *made = ssd.like(x, steps, A, B, C, D, starts, None, Q)
    y = y.flatten(2)
    out, scale = norm.like(y, None, norm_weight, group_size, eps)
    return [out, convolved, steps, y, scale, *made]


@opaque("cpp_mixer", like=_like)
def _forward(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    starts: Tensor | None,
    limit: list[float] | None,
    eps: float,
    Q: int,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
) -> list[Tensor]:
    """The result, and what convolution, steps, scan and norm made on the way."""
    z, xbc, dt = _parts(zxbcdt, len(norm_weight), (heads, groups, state))
    convolved = conv.forward(xbc, conv_weight, conv_bias, None, starts, True)
    x, B, C = _heads(convolved, len(norm_weight), (heads, groups, state))
    steps = F.softplus(dt.float() + dt_bias.float())
    y, _, kept = ssd.forward(x, *_scanned(steps, A, limit), B, C, _single(D), starts, None, Q)
    y = y.flatten(2)
    out, scale = norm.forward(y, z, norm_weight, group_size, eps)
    return [out, convolved, steps, y, scale, *kept[5:]]


def _like_gradients(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:7])


@opaque("cpp_mixer_backward", like=_like_gradients)
def _backward(
    dout: Tensor,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    starts: Tensor | None,
    made: list[Tensor],
    limit: list[float] | None,
    Q: int,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d of the first seven inputs; empty for what is None."""
    convolved, steps, y, scale, *kept = made
    inner, dzxbcdt, sizes = len(norm_weight), torch.empty_like(zxbcdt), (heads, groups, state)
    (z, xbc, _), (dz, dxbc, ddt) = (_parts(t, inner, sizes) for t in (zxbcdt, dzxbcdt))
    dy, dnorm = norm.backward(dout, y, z, norm_weight, scale, group_size, dz)
    x, B, _ = _heads(convolved, inner, sizes)
    dconvolved = torch.empty_like(convolved)
    dx, dB, dC = _heads(dconvolved, inner, sizes)
    scanned = (x, *_scanned(steps, A, limit), B, _single(D), *kept)
    dsteps, dA, dD, _ = ssd.backward(dy.unflatten(-1, dx.shape[2:]), None, scanned, Q, dx, dB, dC)
    dconv, dbias = conv.backward(dconvolved, xbc, conv_weight, conv_bias, None, starts, True, dxbc, None)
    draw = _through_softplus(dsteps, steps, limit)
    ddt.copy_(draw)
    dD = dout.new_empty(0) if D is None else dD.to(D.dtype)
    dbias = dout.new_empty(0) if dbias is None else dbias
    return dzxbcdt, dconv.contiguous(), dbias, draw.sum((0, 1)).to(dt_bias.dtype), dA.to(A.dtype), dD, dnorm


def _scanned(steps: Tensor, A: Tensor, limit: list[float] | None) -> tuple[Tensor, Tensor]:
    """dt and A as the scan takes them."""
    return steps if limit is None else steps.clamp(*limit), A.float().contiguous()


def _single(D: Tensor | None) -> Tensor | None:
    return None if D is None else D.float().contiguous()


def _parts(zxbcdt: Tensor, inner: int, sizes: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """sizes: heads, groups, state"""
    heads, groups, state = sizes
    return zxbcdt.split([inner, inner + 2 * groups * state, heads], dim=-1)


def _heads(xbc: Tensor, inner: int, sizes: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """[b, L, C] -> x [b, L, H, P], B and C [b, L, G, N]"""
    heads, groups, state = sizes
    x, B, C = xbc.split([inner, groups * state, groups * state], dim=-1)
    return x.unflatten(-1, (heads, -1)), *(t.unflatten(-1, (groups, -1)) for t in (B, C))


def _through_softplus(dsteps: Tensor, steps: Tensor, limit: list[float] | None) -> Tensor:
    """softplus'(s) = sigmoid(s) = 1 - exp(-softplus(s)); nothing passes where steps were clamped."""
    if limit is not None:
        dsteps = dsteps.masked_fill((steps < limit[0]) | (steps > limit[1]), 0.0)
    return dsteps * -torch.expm1(-steps)
