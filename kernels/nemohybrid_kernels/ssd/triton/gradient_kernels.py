"""Gradients of a chunk, in two kernels: all that belongs to single heads, and what the heads of a group add up to.

One kernel would have to hold the gradients of B, of C and of C B^T at once, three tiles of 128 x 128 in fp32.
"""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import dot


@triton.jit
def ssd_head_gradients(
    x,
    B,
    C,
    D,
    dt,
    decay,
    leave,
    starts,
    dy,
    d_states,
    dx,
    dCB,
    direct,
    gained,
    lost,
    left,
    dD,
    L,
    H,
    chunks,
    gained_stride,
    dD_stride,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    dy_stride_b,
    dy_stride_l,
    dy_stride_h,
    dx_stride_b,
    dx_stride_l,
    dx_stride_h,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PADDED_P: tl.constexpr,
    PADDED_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """dx; dCB summed over HEADS heads, transposed, [B, chunks, G, blocks, CHUNK j, CHUNK i]; dD of each tile of a chunk,
    [tiles, B, H, chunks]; and for every token [B, H, T], as `ssd_decays_backward` takes them: `direct`, `lost`, `left`,
    and `gained` of each tile.

    d_states is the gradient of the state after each chunk. A program has ROWS tokens j of a chunk, whose x is weighed into
    y of all tokens i of the chunk. The pair (j, j) decays nothing; its terms are kept apart, because they dwarf the others
    where decays are strong.
    """
    blocks: tl.constexpr = (R + HEADS - 1) // HEADS
    tiles: tl.constexpr = CHUNK // ROWS
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    block, rest = rest % blocks, rest // blocks
    groups = H // R
    g, rest = rest % groups, rest // groups
    chunk, b = rest % chunks, (rest // chunks).to(tl.int64)
    first = chunk * CHUNK
    j, i = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n, p = tl.arange(0, PADDED_N), tl.arange(0, PADDED_P)
    rows_j, rows_i = first + j < L, first + i < L

    start = first.to(tl.int64)
    C_base = C + b * C_stride_b + start * C_stride_l + g * C_stride_g
    B_at = b * B_stride_b + start * B_stride_l + g * B_stride_g + j[:, None] * B_stride_l + n[None, :]
    B_jN = tl.load(B + B_at, mask=rows_j[:, None] & (n < N)[None, :], other=0.0)
    C_iN = tl.load(C_base + i[:, None] * C_stride_l + n[None, :], mask=rows_i[:, None] & (n < N)[None, :], other=0.0)
    C_jN = tl.load(C_base + j[:, None] * C_stride_l + n[None, :], mask=rows_j[:, None] & (n < N)[None, :], other=0.0)
    itself = tl.sum(B_jN.to(tl.float32) * C_jN.to(tl.float32), axis=1)
    later = i[None, :] > j[:, None]
    if starts is not None:
        began = tl.load(starts + b * L + first + i, mask=rows_i, other=0)
        later = later & (first + j[:, None] >= began[None, :])
    CB = tl.where(later, dot(B_jN, tl.trans(C_iN), tl.zeros((ROWS, CHUNK), tl.float32)), 0.0)
    d_CB = tl.zeros((ROWS, CHUNK), tl.float32)

    for h in range(g * R + block * HEADS, g * R + tl.minimum(block * HEADS + HEADS, R)):
        vectors = (b * H + h) * (chunks * CHUNK) + first
        dt_j, leave_j = tl.load(dt + vectors + j), tl.load(leave + vectors + j)
        decay_i, decay_j = tl.load(decay + vectors + i), tl.load(decay + vectors + j)
        own = rows_j[:, None] & (p < P)[None, :]
        dy_base = dy + b * dy_stride_b + start * dy_stride_l + h * dy_stride_h
        x_at = b * x_stride_b + start * x_stride_l + h * x_stride_h + j[:, None] * x_stride_l + p[None, :]
        x_jP = tl.load(x + x_at, mask=own, other=0.0)
        dy_iP = tl.load(dy_base + i[:, None] * dy_stride_l + p[None, :], mask=rows_i[:, None] & (p < P)[None, :], other=0.0)
        dy_jP = tl.load(dy_base + j[:, None] * dy_stride_l + p[None, :], mask=own, other=0.0).to(tl.float32)
        S_at = ((b * chunks + chunk) * H + h) * (N * P) + n[:, None] * P + p[None, :]
        dS_NP = tl.load(d_states + S_at, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)

        between = tl.exp2(tl.minimum(decay_i[None, :] - decay_j[:, None], 0.0))
        d_weights = dot(x_jP, tl.trans(dy_iP), tl.zeros((ROWS, CHUNK), tl.float32)) * between
        d_CB += d_weights * dt_j[:, None]
        d_between = d_weights * CB
        lost_j = tl.sum(d_between, axis=1)
        tl.store(gained + tile * gained_stride + vectors + i, tl.sum(d_between * dt_j[:, None], axis=0))

        x_jP = x_jP.to(tl.float32)
        from_state = dot(B_jN, dS_NP, tl.zeros((ROWS, PADDED_P), tl.float32)) * leave_j[:, None]
        left_j = tl.sum(x_jP * from_state, axis=1)
        product_j = tl.sum(x_jP * dy_jP, axis=1)
        tl.store(direct + vectors + j, lost_j + left_j + itself * product_j)
        tl.store(lost + vectors + j, lost_j * dt_j)
        tl.store(left + vectors + j, left_j * dt_j)

        total = dot((CB * between).to(dS_NP.dtype), dy_iP, from_state) * dt_j[:, None]
        skip = itself * dt_j
        if D is not None:
            skip += tl.load(D + h).to(tl.float32)
            tl.store(dD + tile * dD_stride + (b * H + h) * chunks + chunk, tl.sum(product_j, axis=0))
        dx_at = b * dx_stride_b + start * dx_stride_l + h * dx_stride_h + j[:, None] * dx_stride_l + p[None, :]
        tl.store(dx + dx_at, (total + skip[:, None] * dy_jP).to(dx.dtype.element_ty), mask=own)

    seen = i[None, :] >= j[:, None]
    if starts is not None:
        began = tl.load(starts + b * L + first + i, mask=rows_i, other=0)
        seen = seen & (first + j[:, None] >= began[None, :])
    at = ((((b * chunks + chunk) * groups + g) * blocks + block) * CHUNK + j[:, None]) * CHUNK + i[None, :]
    tl.store(dCB + at, tl.where(seen, d_CB, 0.0).to(dCB.dtype.element_ty))


@triton.jit
def ssd_group_gradients(
    x,
    states,
    weight,
    dt,
    dCB,
    other,
    C,
    out,
    entered,
    L,
    H,
    chunks,
    entered_stride,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    other_stride_b,
    other_stride_l,
    other_stride_g,
    C_stride_b,
    C_stride_l,
    C_stride_g,
    out_stride_b,
    out_stride_l,
    out_stride_g,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PADDED_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dB or dC of a chunk: sum over heads of weight dt x state^T, plus dCB (or dCB^T) times the other of the two.

    For dB: x, the gradients of the states after, `leave` and dt, C as `other`. For dC (C is given, dt is not): dy, the
    states before, `enter`, B as `other`; the share of the entering state in the gradient of its decay then goes to
    `entered` [tiles of N, B, H, T]. A program has ROWS tokens x BLOCK_N states.
    """
    tiles: tl.constexpr = CHUNK // ROWS
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    tile_n, rest = rest % tiles_n, rest // tiles_n
    groups = H // R
    g, rest = rest % groups, rest // groups
    chunk, b = rest % chunks, (rest // chunks).to(tl.int64)
    first = chunk * CHUNK
    m, k = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    n, p = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, PADDED_P)
    rows, start = first + m < L, first.to(tl.int64)
    own = rows[:, None] & (n < N)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if C is not None:
        C_at = b * C_stride_b + start * C_stride_l + g * C_stride_g + m[:, None] * C_stride_l + n[None, :]
        C_mN = tl.load(C + C_at, mask=own, other=0.0).to(tl.float32)

    for h in range(g * R, g * R + R):
        vectors = (b * H + h) * (chunks * CHUNK) + first + m
        x_at = b * x_stride_b + start * x_stride_l + h * x_stride_h + m[:, None] * x_stride_l + p[None, :]
        x_mP = tl.load(x + x_at, mask=rows[:, None] & (p < P)[None, :], other=0.0)
        S_at = ((b * chunks + chunk) * H + h) * (N * P) + n[:, None] * P + p[None, :]
        S_NP = tl.load(states + S_at, mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)
        factor = tl.load(weight + vectors)
        if dt is not None:
            factor *= tl.load(dt + vectors)
        part = dot(x_mP, tl.trans(S_NP), tl.zeros((ROWS, BLOCK_N), tl.float32)) * factor[:, None]
        total += part
        if C is not None:
            tl.store(entered + tile_n * entered_stride + vectors, tl.sum(part * C_mN, axis=1))

    other_at = b * other_stride_b + start * other_stride_l + g * other_stride_g + k[:, None] * other_stride_l + n[None, :]
    other_kN = tl.load(other + other_at, mask=(first + k < L)[:, None] & (n < N)[None, :], other=0.0)
    for block in range(BLOCKS):
        base = dCB + (((b * chunks + chunk) * groups + g) * BLOCKS + block) * (CHUNK * CHUNK)
        if C is not None:
            d_CB = tl.trans(tl.load(base + k[:, None] * CHUNK + m[None, :]))
        else:
            d_CB = tl.load(base + m[:, None] * CHUNK + k[None, :])
        total = dot(d_CB, other_kN, total)
    out_at = b * out_stride_b + start * out_stride_l + g * out_stride_g + m[:, None] * out_stride_l + n[None, :]
    tl.store(out + out_at, total.to(out.dtype.element_ty), mask=own)
