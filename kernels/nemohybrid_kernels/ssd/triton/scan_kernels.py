"""y of every chunk, from its own tokens and from the state before it; and dx, which is the same thing backward in time."""

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
    edge,
    starts,
    states,
    y,
    source,
    exchanged,
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
    source_stride_b,
    source_stride_l,
    source_stride_h,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PADDED_P: tl.constexpr,
    PADDED_N: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """y_i = edge_i C_i S + sum_j<=i exp2(decay_i - decay_j) dt_j (C_i B_j) x_j + D x_i, edge being `enter`.

    REVERSE: y is dx, x is dy, B and C are each other, edge is `leave`, states the gradients of those after each chunk:
    dx_i = dt_i (edge_i C_i S + sum_j>=i exp2(decay_j - decay_i) (C_i B_j) x_j) + D x_i.
    Then `exchanged` [B, H, T] gets what x (here `source`) and the state gave each other, without dt.
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
    B_base = B + b * B_stride_b + start * B_stride_l + g * B_stride_g
    C_base = C + b * C_stride_b + start * C_stride_l + g * C_stride_g
    B_jN = tl.load(B_base + j[:, None] * B_stride_l + n[None, :], mask=rows_j[:, None] & (n < N)[None, :], other=0.0)
    C_iN = tl.load(C_base + i[:, None] * C_stride_l + n[None, :], mask=rows_i[:, None] & (n < N)[None, :], other=0.0)
    if REVERSE:
        meets = j[None, :] >= i[:, None]
    else:
        meets = i[:, None] >= j[None, :]
    if starts is not None:
        if REVERSE:
            began = tl.load(starts + b * L + first + j, mask=rows_j, other=0)
            meets = meets & (first + i[:, None] >= began[None, :])
        else:
            began = tl.load(starts + b * L + first + i, mask=rows_i, other=0)
            meets = meets & (first + j[None, :] >= began[:, None])
    CB = tl.where(meets, dot(C_iN, tl.trans(B_jN), tl.zeros((ROWS, CHUNK), tl.float32)), 0.0)

    for h in range(g * R + block * HEADS, g * R + tl.minimum(block * HEADS + HEADS, R)):
        vectors = (b * H + h) * (chunks * CHUNK) + first
        decay_i, decay_j = tl.load(decay + vectors + i), tl.load(decay + vectors + j)
        x_base = x + b * x_stride_b + start * x_stride_l + h * x_stride_h
        x_jP = tl.load(
            x_base + j[:, None] * x_stride_l + p[None, :], mask=rows_j[:, None] & (p < P)[None, :], other=0.0
        )
        S_base = states + ((b * chunks + chunk) * H + h) * (N * P)
        S_NP = tl.load(S_base + n[:, None] * P + p[None, :], mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)
        own = rows_i[:, None] & (p < P)[None, :]

        # Of pairs that do not meet CB is 0, and the factor anything up to 1.
        if REVERSE:
            weights = CB * tl.exp2(tl.minimum(decay_j[None, :] - decay_i[:, None], 0.0))
        else:
            weights = (
                CB * tl.exp2(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0)) * tl.load(dt + vectors + j)[None, :]
            )
        total = dot(C_iN, S_NP, tl.zeros((ROWS, PADDED_P), tl.float32)) * tl.load(edge + vectors + i)[:, None]
        if REVERSE:
            source_base = source + b * source_stride_b + start * source_stride_l + h * source_stride_h
            source_iP = tl.load(source_base + i[:, None] * source_stride_l + p[None, :], mask=own, other=0.0)
            tl.store(exchanged + vectors + i, tl.sum(source_iP.to(tl.float32) * total, axis=1))
        total = dot(weights.to(x_jP.dtype), x_jP, total)
        if REVERSE:
            total = total * tl.load(dt + vectors + i)[:, None]
        if D is not None:
            x_iP = tl.load(x_base + i[:, None] * x_stride_l + p[None, :], mask=own, other=0.0).to(tl.float32)
            total += tl.load(D + h).to(tl.float32) * x_iP
        y_base = y + b * y_stride_b + start * y_stride_l + h * y_stride_h
        tl.store(y_base + i[:, None] * y_stride_l + p[None, :], total.to(y.dtype.element_ty), mask=own)
