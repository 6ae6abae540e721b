"""Rows to the experts and back: both only read from afar, and write every row where it stands.

A program has ROWS rows and goes over their columns in steps of BLOCK. T tokens, n visits, D columns.
"""

import triton
import triton.language as tl


@triton.jit
def moe_permute(x, order, end, out, n, D, copies, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, D]: row i is the row of x [n / copies, D] whose visit is order[i]. From row `end` on nothing is written."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = rows < n
    if end is not None:
        used = used & (rows < tl.load(end))
    token = tl.load(order + rows, mask=used, other=0) // copies
    for first in range(0, D, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = used[:, None] & (columns < D)[None, :]
        row = tl.load(x + token[:, None] * x_stride + columns[None, :], mask=inside)
        tl.store(out + rows[:, None] * D + columns[None, :], row, mask=inside)


@triton.jit
def moe_unpermute(
    rows, place, end, out, T, D, rows_stride, COPIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out [T, D]: token t is the sum over k, in this order, of the rows at place[t COPIES + k] that lie before `end`."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for first in range(0, D, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        there = (token < T)[:, None] & (columns < D)[None, :]
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in tl.static_range(COPIES):  # pyright: ignore[reportGeneralTypeIssues]
            at = tl.load(place + token * COPIES + k, mask=token < T, other=0)
            inside = there
            if end is not None:
                inside = there & (at < tl.load(end))[:, None]
            row = tl.load(rows + at[:, None] * rows_stride + columns[None, :], mask=inside, other=0.0)
            total += row.to(tl.float32)
        tl.store(out + token[:, None] * D + columns[None, :], total.to(out.dtype.element_ty), mask=there)
