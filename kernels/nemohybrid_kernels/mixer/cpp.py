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
    settings: dict[str, Any] = {"heads": heads, "groups": groups, "state": state, "group_size": group_size, "eps": eps}
    if conv_weight.shape[1] > conv.WIDEST:
        settings |= {"document_ids": document_ids, "dt_limit": dt_limit, "chunk_size": chunk_size}
        return mamba2_mixer_torch(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, **settings)
    P = len(norm_weight) // heads
    Q = min(chunk_size or default_chunk_size(zxbcdt.new_empty(0, P)), zxbcdt.shape[1])
    starts = None if document_ids is None else document_starts(document_ids)
    parameters = (conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    return _Mixer.apply(zxbcdt, *parameters, starts, dt_limit, Q, settings)  # pyright: ignore[reportReturnType]


class _Mixer(torch.autograd.Function):
    """Keeps zxbcdt, y of the scan, and what the scan keeps."""

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
        starts: Tensor | None,
        dt_limit: tuple[float, float] | None,
        Q: int,
        settings: dict[str, Any],
    ) -> Tensor:
        zxbcdt = zxbcdt if zxbcdt.stride(2) == 1 else zxbcdt.contiguous()
        z, xbc, dt = _parts(zxbcdt, len(norm_weight), settings)
        x, B, C = _heads(conv.forward(xbc, conv_weight, conv_bias, None, starts, True), len(norm_weight), settings)
        steps = F.softplus(dt.float() + dt_bias.float())
        clamped = steps if dt_limit is None else steps.clamp(*dt_limit)
        skip = None if D is None else D.float().contiguous()
        y, _, kept = ssd.forward(x, clamped, A.float().contiguous(), B, C, skip, starts, None, Q)
        y = y.flatten(2)
        out, scale = norm.forward(y, z, norm_weight, settings["group_size"], settings["eps"])
        ctx.save_for_backward(
            zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, starts, steps, y, scale, *kept
        )
        ctx.settings = (dt_limit, Q, settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, starts, steps, y, scale, *kept = ctx.saved_tensors
        dt_limit, Q, settings = ctx.settings
        inner, dzxbcdt = len(norm_weight), torch.empty_like(zxbcdt)
        (z, xbc, _), (dz, dxbc, ddt) = (_parts(t, inner, settings) for t in (zxbcdt, dzxbcdt))
        dy, dnorm = norm.backward(grads[0], y, z, norm_weight, scale, settings["group_size"], dz)
        convolved = zxbcdt.new_empty(xbc.shape)
        dx, dB, dC = _heads(convolved, inner, settings)
        dsteps, dA, dD, _ = ssd.backward(dy.unflatten(-1, dx.shape[2:]), None, tuple(kept), Q, dx, dB, dC)
        dconv, dbias = conv.backward(convolved, xbc, conv_weight, conv_bias, None, starts, True, dxbc, None)
        draw = _through_softplus(dsteps, steps, dt_limit)
        ddt.copy_(draw)
        small = (draw.sum((0, 1)).to(dt_bias.dtype), dA.to(A.dtype), None if D is None else dD.to(D.dtype))
        return dzxbcdt, dconv, dbias, *small, dnorm, None, None, None, None


def _parts(zxbcdt: Tensor, inner: int, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    shared = settings["groups"] * settings["state"]
    return zxbcdt.split([inner, inner + 2 * shared, settings["heads"]], dim=-1)


def _heads(xbc: Tensor, inner: int, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """[b, L, C] -> x [b, L, H, P], B and C [b, L, G, N]"""
    shared = settings["groups"] * settings["state"]
    x, B, C = xbc.split([inner, shared, shared], dim=-1)
    return x.unflatten(-1, (settings["heads"], -1)), *(t.unflatten(-1, (settings["groups"], -1)) for t in (B, C))


def _through_softplus(dsteps: Tensor, steps: Tensor, limit: tuple[float, float] | None) -> Tensor:
    """softplus'(s) = sigmoid(s) = 1 - exp(-softplus(s)); nothing passes where steps were clamped."""
    if limit is not None:
        dsteps = dsteps.masked_fill((steps < limit[0]) | (steps > limit[1]), 0.0)
    return dsteps * -torch.expm1(-steps)
