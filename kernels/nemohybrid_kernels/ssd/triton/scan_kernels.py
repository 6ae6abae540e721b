"""y of every chunk, from its own tokens and from the state before it."""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import dot


@triton.jit
def ssd_scan(
    x,
    B,
    C,
    D,
    dt,
    decay,
    enter,
    starts,
    states,
    y,
    L,
    H,
    chunks,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    y_stride_b,
    y_stride_l,
    y_stride_h,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PADDED_P: tl.constexpr,
    PADDED_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """y_i = enter_i C_i S + sum_j<=i exp2(decay_i - decay_j) dt_j (C_i B_j) x_j + D x_i.

    A program has ROWS tokens of a chunk and HEADS heads of a group. C B^T is made once for all of them and stays on chip.
    """
    blocks: tl.constexpr = (R + HEADS - 1) // HEADS
    tiles: tl.constexpr = CHUNK // ROWS
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    block, rest = rest % blocks, rest // blocks
    groups = H // R
    g, rest = rest % groups, rest // groups
    chunk, b = rest % chunks, (rest // chunks).to(tl.int64)
    first = chunk * CHUNK
    i, j = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n, p = tl.arange(0, PADDED_N), tl.arange(0, PADDED_P)
    rows_i, rows_j = first + i < L, first + j < L

    start = first.to(tl.int64)
    B_at = b * B_stride_b + start * B_stride_l + g * B_stride_g + j[:, None] * B_stride_l + n[None, :]
    C_at = b * C_stride_b + start * C_stride_l + g * C_stride_g + i[:, None] * C_stride_l + n[None, :]
    B_jN = tl.load(B + B_at, mask=rows_j[:, None] & (n < N)[None, :], other=0.0)
    C_iN = tl.load(C + C_at, mask=rows_i[:, None] & (n < N)[None, :], other=0.0)
    sees = i[:, None] >= j[None, :]
    if starts is not None:
        began = tl.load(starts + b * L + first + i, mask=rows_i, other=0)
        sees = sees & (first + j[None, :] >= began[:, None])
    CB = tl.where(sees, dot(C_iN, tl.trans(B_jN), tl.zeros((ROWS, CHUNK), tl.float32)), 0.0)

    for h in range(g * R + block * HEADS, g * R + tl.minimum(block * HEADS + HEADS, R)):
        vectors = (b * H + h) * (chunks * CHUNK) + first
        decay_i, decay_j = tl.load(decay + vectors + i), tl.load(decay + vectors + j)
        between = tl.exp2(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0))  # of pairs that do not see: anything <= 1
        weights = CB * between * tl.load(dt + vectors + j)[None, :]
        head = b * x_stride_b + start * x_stride_l + h * x_stride_h
        x_jP = tl.load(x + head + j[:, None] * x_stride_l + p[None, :], mask=rows_j[:, None] & (p < P)[None, :], other=0.0)
        if states is not None:
            S_at = ((b * chunks + chunk) * H + h) * (N * P) + n[:, None] * P + p[None, :]
            S_NP = tl.load(states + S_at, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)
            total = dot(C_iN, S_NP, tl.zeros((ROWS, PADDED_P), tl.float32))
            total = total * tl.load(enter + vectors + i)[:, None]
        else:
            total = tl.zeros((ROWS, PADDED_P), tl.float32)
        total = dot(weights.to(x_jP.dtype), x_jP, total)
        own = rows_i[:, None] & (p < P)[None, :]
        if D is not None:
            x_iP = tl.load(x + head + i[:, None] * x_stride_l + p[None, :], mask=own, other=0.0).to(tl.float32)
            total += tl.load(D + h).to(tl.float32) * x_iP
        y_at = b * y_stride_b + start * y_stride_l + h * y_stride_h + i[:, None] * y_stride_l + p[None, :]
        tl.store(y + y_at, total.to(y.dtype.element_ty), mask=own)
