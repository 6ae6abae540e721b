"""The RMS norms in Triton: launchers on plain tensors, and custom operators made of them.

Nothing here waits for the device or reads a tensor, so it can be captured in a graph, and run on the meta device where
launches are recorded. T tokens: all dimensions but the last, D channels.
"""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels.launching import Config, config_for, dtype_fact, launch
from nemohybrid_kernels.norm import triton_kernels

WARPS = 2048
"""In all programs of the backward kernel: 16 on each of some 130 multiprocessors. Each program leaves a share of the
weight's gradient to add up, so more than run at once would only cost."""


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.norm.rms_norm`; twin: `reference.rms_norm`."""
    return _rms(x, weight, eps)[0]


def gated_rms_norm_triton(x: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.norm.gated_rms_norm`; twin: `reference.gated_rms_norm`."""
    return _gated(x, z, weight, group_size, eps)[0]


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., D], contiguous, and rstd [T, 1] fp32. Rows of x may be parts of wider ones."""
    return _forward(x, None, weight, x.shape[-1], eps)


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx like x, and dweight [D] fp32."""
    dx, _, dweight = _backward(dy, x, None, weight, rstd, x.shape[-1], None)
    return dx, dweight


def gated_forward(x: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    """out [..., D], contiguous, and rstd [T, D / group_size] fp32. Rows of x and z may be parts of wider ones."""
    return _forward(x, z, weight, group_size, eps)


def gated_backward(
    dout: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, group_size: int, dz: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz, and dweight [D] fp32. A `dz` given is filled, and may be columns of wider rows."""
    dz = z.new_empty(z.shape) if dz is None else dz
    dx, dz, dweight = _backward(dout, x, z, weight, rstd, group_size, dz)
    assert dz is not None, "it was given"
    return dx, dz, dweight


def _forward(x: Tensor, z: Tensor | None, weight: Tensor, size: int, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    groups, rows, gates = D // size, _rows(x), None if z is None else _rows(z)
    T = len(rows)
    out, rstd = x.new_empty(x.shape), x.new_empty(T, groups, dtype=torch.float32)
    config = _config("norm_forward", x, size)
    launch(
        triton_kernels.norm_forward,
        (-(-T // config.tiles["ROWS"]) * groups,),
        config,
        x=rows,
        z=gates,
        weight=weight.contiguous(),
        out=out,
        rstd=rstd,
        T=T,
        D=D,
        groups=groups,
        size=size,
        eps=eps,
        x_stride=rows.stride(0),
        z_stride=0 if gates is None else gates.stride(0),
    )
    return out, rstd


def _backward(
    dout: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, rstd: Tensor, size: int, dz: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    D = x.shape[-1]
    groups, gradients, rows = D // size, _rows(dout), _rows(x)
    gates, into = (None, None) if z is None or dz is None else (_rows(z), dz.view(-1, D))
    T, dx = len(rows), x.new_empty(x.shape)
    config = _config("norm_backward", x, size)
    workers = min(-(-T // config.tiles["ROWS"]), max(1, WARPS // (config.warps * groups)))
    shares = x.new_empty(workers, D, dtype=torch.float32)
    launch(
        triton_kernels.norm_backward,
        (workers * groups,),
        config,
        dout=gradients,
        x=rows,
        z=gates,
        weight=weight.contiguous(),
        rstd=rstd,
        dx=dx,
        dz=into,
        partial=shares,
        T=T,
        D=D,
        groups=groups,
        size=size,
        workers=workers,
        dout_stride=gradients.stride(0),
        x_stride=rows.stride(0),
        z_stride=0 if gates is None else gates.stride(0),
        dx_stride=D,
        dz_stride=0 if into is None else into.stride(0),
    )
    return dx, dz, shares.sum(0)


def _rows(t: Tensor) -> Tensor:
    """[..., D] -> [T, D], the last dimension contiguous: a view, wherever one row stride leads to every token."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _config(kernel: str, x: Tensor, size: int) -> Config:
    """The table has ELEMENTS of a tile; groups smaller than it share one."""
    found, block = config_for(kernel, x.device, size=size, dtype=dtype_fact(x)), 1 << (size - 1).bit_length()
    return Config({"ROWS": max(1, found.tiles["ELEMENTS"] // block), "BLOCK": block}, found.warps, found.stages)


@torch.library.custom_op("nemohybrid::rms_norm", mutates_args=())
def _rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_forward(x, weight, eps)


@torch.library.custom_op("nemohybrid::rms_norm_backward", mutates_args=())
def _rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return rms_backward(dy, x, weight, rstd)


@torch.library.custom_op("nemohybrid::gated_rms_norm", mutates_args=())
def _gated(x: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    return gated_forward(x, z, weight, group_size, eps)


@torch.library.custom_op("nemohybrid::gated_rms_norm_backward", mutates_args=())
def _gated_backward(
    dout: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return gated_backward(dout, x, z, weight, rstd, group_size)


@_rms.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fp32(x, x.numel() // x.shape[-1], 1)


@_rms_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fp32(x, x.shape[-1])


@_gated.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    return x.new_empty(x.shape), _fp32(x, x.numel() // D, D // group_size)


@_gated_backward.register_fake
def _(
    dout: Tensor, x: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), z.new_empty(z.shape), _fp32(x, x.shape[-1])


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _keep_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # nobody asks rstd for a gradient


def _rms_gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _rms_backward(dy, x, weight, rstd)
    return dx, dweight.to(weight.dtype), None


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, z, weight, ctx.group_size, _ = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.set_materialize_grads(False)


def _gated_gradients(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, weight, rstd = ctx.saved_tensors
    dx, dz, dweight = _gated_backward(dout, x, z, weight, rstd, ctx.group_size)
    return dx, dz, dweight.to(weight.dtype), None, None


_rms.register_autograd(_rms_gradients, setup_context=_keep_rms)
_gated.register_autograd(_gated_gradients, setup_context=_keep_gated)
