"""relu(x)^2, which a weight of its row may multiply: rows of a feed-forward layer, or of visits to experts.

A program has ROWS rows and goes over their columns in steps of BLOCK. n rows, F columns.
"""

import triton
import triton.language as tl


@triton.jit
def relu2_forward(x, weights, order, end, out, n, F, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, F] = relu(x)^2 w, rounded once, where w = weights[order[row]]; without `weights` 1.

    From row `end` on, a number in memory, nothing is read or written; without `end` there is no such row.
    """
    rows, used = _rows(end, n, ROWS)
    w = _of_rows(weights, order, rows, used, ROWS)
    for first in range(0, F, BLOCK):
        columns, inside = _columns(first, used, F, BLOCK)
        h = _positive(x, rows, x_stride, columns, inside)
        _store(out, rows, F, columns, inside, h * h * w[:, None])


@triton.jit
def relu2_backward(
    dout, x, weights, order, end, dx, dweights, n, F, dout_stride, x_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [n, F]; and with weights dweights [n], in their order, while `dout` becomes what `relu2_forward` gave.

    Rows from `end` on have weights too, whose gradients are zero.
    """
    rows, used = _rows(end, n, ROWS)
    w = _of_rows(weights, order, rows, used, ROWS)
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, F, BLOCK):
        columns, inside = _columns(first, used, F, BLOCK)
        h = _positive(x, rows, x_stride, columns, inside)
        at = rows[:, None] * dout_stride + columns[None, :]
        d = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        _store(dx, rows, F, columns, inside, 2.0 * h * d * w[:, None])
        if weights is not None:
            share += d * h * h
            _store(dout, rows, dout_stride, columns, inside, h * h * w[:, None])
    if weights is not None:
        visit = tl.load(order + rows, mask=rows < n, other=0)
        tl.store(dweights + visit, tl.sum(share, axis=1), mask=rows < n)


@triton.jit
def _rows(end, n, ROWS: tl.constexpr):
    """The rows of this program in int64, and which of them there are."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = rows < n
    if end is not None:
        used = used & (rows < tl.load(end))
    return rows, used


@triton.jit
def _of_rows(weights, order, rows, used, ROWS: tl.constexpr):
    w = tl.full([ROWS], 1.0, tl.float32)
    if weights is not None:
        w = tl.load(weights + tl.load(order + rows, mask=used, other=0), mask=used, other=0.0).to(tl.float32)
    return w


@triton.jit
def _columns(first, used, F, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    return columns, used[:, None] & (columns < F)[None, :]


@triton.jit
def _positive(x, rows, stride, columns, inside):
    """relu(x), which leaves what is no number as it is."""
    value = tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def _store(pointer, rows, stride, columns, inside, value):
    place = rows[:, None] * stride + columns[None, :]
    tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=inside)
