"""RMS norms by group, with or without a gate: a group of channels of a token stays in registers from load to store.

A tile is ROWS tokens of one group; BLOCK is the group's `size` made a power of two. T tokens, D channels in `groups`.
"""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import sigmoid


@triton.jit
def norm_forward(
    x, z, weight, out, rstd, T, D, groups, size, eps, x_stride, z_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, D] = h rstd weight, rstd [T, groups] = 1 / sqrt(mean(h^2) + eps), where h = x silu(z), or x."""
    program = tl.program_id(0)
    group = program % groups
    rows = program // groups * ROWS + tl.arange(0, ROWS)
    columns, inside, at = _tile(rows, group, T, size, ROWS, BLOCK)
    h = _load(x, rows, x_stride, at, inside)
    if z is not None:
        gate = _load(z, rows, z_stride, at, inside)
        h *= gate * sigmoid(gate)
    scale = tl.math.rsqrt(tl.sum(h * h, axis=1) / size + eps)
    tl.store(rstd + rows.to(tl.int64) * groups + group, scale, mask=rows < T)
    w = tl.load(weight + at, mask=columns < size, other=0.0).to(tl.float32)
    _store(out, rows, D, at, inside, h * scale[:, None] * w[None, :])


@triton.jit
def norm_backward(
    dout, x, z, weight, rstd, dx, dz, partial, T, D, groups, size, workers,
    dout_stride, x_stride, z_stride, dx_stride, dz_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dz [T, D] and partial [workers, D] fp32, the shares of dweight. Every group has `workers` programs.

    A program goes over tokens in steps, and adds to the shares of its rows only at the end.
    """
    program = tl.program_id(0)
    group = program % groups
    worker = program // groups
    first = worker * ROWS
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + group * size + columns, mask=columns < size, other=0.0).to(tl.float32)
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(0, T - first, workers * ROWS):
        rows = first + step + tl.arange(0, ROWS)
        columns, inside, at = _tile(rows, group, T, size, ROWS, BLOCK)
        d = _load(dout, rows, dout_stride, at, inside)
        value = _load(x, rows, x_stride, at, inside)
        scale = tl.load(rstd + rows.to(tl.int64) * groups + group, mask=rows < T, other=0.0)[:, None]
        if z is None:
            dh, share = _through_norm(d, value, w, scale, share, size)
            _store(dx, rows, dx_stride, at, inside, dh)
        else:
            gate = _load(z, rows, z_stride, at, inside)
            s = sigmoid(gate)
            dh, share = _through_norm(d, value * gate * s, w, scale, share, size)
            _store(dx, rows, dx_stride, at, inside, dh * gate * s)
            _store(dz, rows, dz_stride, at, inside, dh * value * s * (1.0 + gate * (1.0 - s)))
    at = worker.to(tl.int64) * D + group * size + columns
    tl.store(partial + at, tl.sum(share, axis=0), mask=columns < size)


@triton.jit
def _tile(rows, group, T, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns within the group, which elements exist, and columns within the row."""
    columns = tl.arange(0, BLOCK)
    return columns, (rows < T)[:, None] & (columns < size)[None, :], group * size + columns


@triton.jit
def _load(pointer, rows, stride, at, inside):
    place = rows.to(tl.int64)[:, None] * stride + at[None, :]
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, rows, stride, at, inside, value):
    place = rows.to(tl.int64)[:, None] * stride + at[None, :]
    tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _through_norm(d, h, w, scale, share, size):
    """The gradient of h, scale (dn - n mean(n dn)) with n = scale h and dn = d w; and `share` with d n."""
    n = h * scale
    dn = d * w[None, :]
    along = tl.sum(n * dn, axis=1) / size
    return scale * (dn - n * along[:, None]), share + d * n
