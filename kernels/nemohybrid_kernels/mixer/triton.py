"""The middle of a Mamba-2 mixer as one custom operator over the kernels of convolution, scan and gated norm."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemohybrid_kernels.conv1d import triton as conv1d
from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.norm import triton as norm
from nemohybrid_kernels.ssd.triton import Call, Into
from nemohybrid_kernels.ssd.triton import backward as scan_backward
from nemohybrid_kernels.ssd.triton import forward as scan_forward


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a mixer do not say by themselves."""

    heads: int
    groups: int
    state: int
    group_size: int
    eps: float
    limit: tuple[float, float] | None
    chunk_size: int | None

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xbc, dt: views."""
        shared = 2 * self.groups * self.state
        inner = (zxbcdt.shape[-1] - self.heads - shared) // 2
        z, xbc, dt = zxbcdt.split([inner, inner + shared, self.heads], dim=-1)
        return z, xbc, dt

    def split_convolved(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, L, H, P], B and C [b, L, G, N]: views."""
        shared = self.groups * self.state
        x, B, C = xbc.split([xbc.shape[-1] - 2 * shared, shared, shared], dim=-1)
        return x.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))


@dataclass(frozen=True)
class Weights:
    """The parameters between the projections, and where documents start."""

    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor | None
    norm: Tensor
    starts: Tensor | None


class Kept(NamedTuple):
    """What the forward pass makes and the backward pass needs: y [b, L, I] before the norm, the norm's rstd; x, B and C
    convolved [b, L, I + 2 G N]; and the states before each chunk, [b, chunks, H, N, P]. The last two can be made again."""

    y: Tensor
    rstd: Tensor
    convolved: Tensor | None
    states: Tensor | None

    @property
    def least(self) -> "Kept":
        return self._replace(convolved=None, states=None)


def forward(zxbcdt: Tensor, weights: Weights, sizes: Sizes) -> tuple[Tensor, Kept]:
    """The normed y [b, L, I], and what there is to keep."""
    z, xbc, dt = sizes.split(zxbcdt)
    convolved = conv1d.forward(xbc, weights.conv, weights.conv_bias, weights.starts, None, True)
    scanned = scan_forward(_call(convolved, dt, weights, sizes))
    y = scanned.y.flatten(2)
    out, rstd = norm.gated_forward(y, z, weights.norm, sizes.group_size, sizes.eps)
    return out, Kept(y, rstd, convolved, scanned.states)


def backward(
    dout: Tensor, zxbcdt: Tensor, kept: Kept, weights: Weights, sizes: Sizes
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The gradient of zxbcdt, and those of the weights by name."""
    d_zxbcdt = torch.empty_like(zxbcdt, memory_format=torch.contiguous_format)
    (z, xbc, dt), (dz, d_xbc, d_dt) = sizes.split(zxbcdt), sizes.split(d_zxbcdt)
    dy, _, d_norm = norm.gated_backward(dout, kept.y, z, weights.norm, kept.rstd, sizes.group_size, dz)
    convolved = kept.convolved
    if convolved is None:
        convolved = conv1d.forward(xbc, weights.conv, weights.conv_bias, weights.starts, None, True)
    d_convolved = torch.empty_like(convolved)
    dx, dB, dC = sizes.split_convolved(d_convolved)
    call, dy = _call(convolved, dt, weights, sizes), dy.unflatten(-1, (sizes.heads, -1))
    got = scan_backward(call, dy, None, Into(dx, d_dt, dB, dC), kept.states)
    conv = conv1d.backward(d_convolved, xbc, weights.conv, weights.conv_bias, weights.starts, None, True, d_xbc)
    named = {"conv": conv.weight, "conv_bias": conv.bias, "dt_bias": got.bias, "A": got.A, "D": got.D, "norm": d_norm}
    return d_zxbcdt, named


def _call(convolved: Tensor, dt: Tensor, weights: Weights, sizes: Sizes) -> Call:
    x, B, C = sizes.split_convolved(convolved)
    given: dict[str, Any] = {"bias": weights.dt_bias, "starts": weights.starts, "softplus": True, "limit": sizes.limit}
    return Call(x, dt, weights.A, B, C, weights.D, **given, chunk_size=sizes.chunk_size)


def mamba2_mixer_triton(
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
    recompute: bool = False,
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.mixer.mamba2_mixer`; twin: `reference.mamba2_mixer_torch`."""
    starts = None if document_ids is None else document_starts(document_ids)
    zxbcdt = zxbcdt if zxbcdt.stride(-1) == 1 else zxbcdt.contiguous()
    low, high = dt_limit or (None, None)
    weights = conv_weight, conv_bias, dt_bias, A.float(), D, norm_weight
    sizes = heads, groups, state, group_size, eps, low, high, chunk_size
    return _mixer(zxbcdt, *weights, starts, *sizes, recompute)[0]


def _sizes(
    heads: int,
    groups: int,
    state: int,
    group_size: int,
    eps: float,
    low: float | None,
    high: float | None,
    chunk_size: int | None,
) -> Sizes:
    limit = None if low is None or high is None else (low, high)
    return Sizes(heads, groups, state, group_size, eps, limit, chunk_size)


@torch.library.custom_op("nemohybrid::mamba2_mixer", mutates_args=())
def _mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    starts: Tensor | None,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
    eps: float,
    low: float | None,
    high: float | None,
    chunk_size: int | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The normed y, and what is kept; with `recompute` empty tensors for what is not."""
    weights = Weights(conv_weight, conv_bias, dt_bias, A, D, norm_weight, starts)
    out, kept = forward(zxbcdt, weights, _sizes(heads, groups, state, group_size, eps, low, high, chunk_size))
    convolved, states = kept.convolved, kept.states
    if recompute or convolved is None or states is None:
        convolved, states = zxbcdt.new_empty(0), zxbcdt.new_empty(0)
    return out, kept.y, kept.rstd, convolved, states


@_mixer.register_fake
def _(zxbcdt: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes, recompute, norm_weight = _sizes(*rest[7:-1]), rest[-1], rest[5]
    out = zxbcdt.new_empty(*zxbcdt.shape[:2], len(norm_weight))
    tokens = zxbcdt.shape[0] * zxbcdt.shape[1]
    rstd = zxbcdt.new_empty(tokens, len(norm_weight) // sizes.group_size, dtype=torch.float32)
    if recompute:
        return out, torch.empty_like(out), rstd, zxbcdt.new_empty(0), zxbcdt.new_empty(0)
    _, xbc, dt = sizes.split(zxbcdt)
    convolved = torch.empty_like(xbc, memory_format=torch.contiguous_format)
    call = _call(convolved, dt, Weights(*rest[:7]), sizes)
    states = zxbcdt.new_empty(call.batch, call.chunks, call.H, call.N, call.P)
    return out, torch.empty_like(out), rstd, convolved, states


@torch.library.custom_op("nemohybrid::mamba2_mixer_backward", mutates_args=())
def _mixer_backward(
    dout: Tensor,
    y: Tensor,
    rstd: Tensor,
    convolved: Tensor,
    states: Tensor,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    starts: Tensor | None,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
    eps: float,
    low: float | None,
    high: float | None,
    chunk_size: int | None,
) -> list[Tensor]:
    """Of zxbcdt and the six weights, in their types; an empty tensor for one that is None."""
    weights = Weights(conv_weight, conv_bias, dt_bias, A, D, norm_weight, starts)
    sizes = _sizes(heads, groups, state, group_size, eps, low, high, chunk_size)
    kept = Kept(y, rstd, convolved, states)
    d_zxbcdt, named = backward(dout, zxbcdt, kept if len(states) else kept.least, weights, sizes)
    given = {"conv": conv_weight, "conv_bias": conv_bias, "dt_bias": dt_bias, "A": A, "D": D, "norm": norm_weight}
    return [d_zxbcdt, *(_of(named[name], weight, A) for name, weight in given.items())]


def _of(gradient: Tensor | None, weight: Tensor | None, like: Tensor) -> Tensor:
    if weight is None:
        return like.new_empty(0)
    assert gradient is not None, "every weight has a gradient"
    return gradient.to(weight.dtype)


@_mixer_backward.register_fake
def _(
    dout: Tensor, y: Tensor, rstd: Tensor, convolved: Tensor, states: Tensor, zxbcdt: Tensor, *rest: Any
) -> list[Tensor]:
    weights, A = rest[:6], rest[3]
    new = [A.new_empty(0) if w is None else torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    return [torch.empty_like(zxbcdt, memory_format=torch.contiguous_format), *new]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:8])
    ctx.sizes = inputs[8:-1]
    ctx.set_materialize_grads(False)  # nobody asks the others for a gradient


def _gradients(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    got = _mixer_backward(dout, *tensors, *ctx.sizes)
    wanted = [None if weight is None else gradient for gradient, weight in zip(got, tensors[4:11], strict=True)]
    return *wanted, None, *(None for _ in ctx.sizes), None


_mixer.register_autograd(_gradients, setup_context=_keep)
