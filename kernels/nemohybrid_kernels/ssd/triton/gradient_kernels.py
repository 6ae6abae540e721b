"""Gradients of a chunk: of the pairs of its tokens, and of B and C, to which all heads of a group add.

One kernel would have to hold the gradients of B, of C and of C B^T at once, three tiles of 128 x 128 in fp32.
"""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import dot


@triton.jit
def ssd_pair_gradients(
    x,
    B,
    C,
    dt,
    decay,
    starts,
    dy,
    dCB,
    gained,
    lost,
    product,
    itself,
    L,
    H,
    chunks,
    part_stride,
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
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PADDED_P: tl.constexpr,
    PADDED_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Of ROWS x ROWS pairs of tokens j <= i of a chunk, whose x_j weighs exp2(decay_i - decay_j) dt_j (C_i B_j) in y_i:

    the gradient of C_i B_j summed over HEADS heads, dCB [B, chunks, G, blocks, CHUNK j, CHUNK i]; and for every token
    [B, H, T] the gradients of the decay that it gained as i and lost as j, both without dt_i, one part for each tile of the
    other token [tiles, B, H, T]. A token decays nothing on its way to itself, and what that pair weighs would drown the
    others where decays are strong: it is kept apart, `product` being x_j dy_j, and `itself` that times C_j B_j.
    """
    blocks: tl.constexpr = (R + HEADS - 1) // HEADS
    tiles: tl.constexpr = CHUNK // ROWS
    tile_j, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    tile_i, rest = rest % tiles, rest // tiles
    block, rest = rest % blocks, rest // blocks
    groups = H // R
    g, rest = rest % groups, rest // groups
    chunk, b = rest % chunks, (rest // chunks).to(tl.int64)
    first = chunk * CHUNK
    j, i = tile_j * ROWS + tl.arange(0, ROWS), tile_i * ROWS + tl.arange(0, ROWS)
    n, p = tl.arange(0, PADDED_N), tl.arange(0, PADDED_P)
    rows_j, rows_i = first + j < L, first + i < L

    start = first.to(tl.int64)
    B_base = B + b * B_stride_b + start * B_stride_l + g * B_stride_g
    C_base = C + b * C_stride_b + start * C_stride_l + g * C_stride_g
    B_jN = tl.load(B_base + j[:, None] * B_stride_l + n[None, :], mask=rows_j[:, None] & (n < N)[None, :], other=0.0)
    C_iN = tl.load(C_base + i[:, None] * C_stride_l + n[None, :], mask=rows_i[:, None] & (n < N)[None, :], other=0.0)
    same, seen = i[None, :] == j[:, None], i[None, :] >= j[:, None]
    if starts is not None:
        began = tl.load(starts + b * L + first + i, mask=rows_i, other=0)
        seen = seen & (first + j[:, None] >= began[None, :])
    CB = dot(B_jN, tl.trans(C_iN), tl.zeros((ROWS, ROWS), tl.float32))
    CB_itself = tl.sum(tl.where(same, CB, 0.0), axis=1)
    CB = tl.where(seen & (same == 0), CB, 0.0)
    d_CB = tl.zeros((ROWS, ROWS), tl.float32)

    heads = tl.minimum(HEADS, R - block * HEADS) if tile_i >= tile_j else 0  # earlier tokens i see nothing of j
    for head in range(0, heads):
        h = g * R + block * HEADS + head
        vectors = (b * H + h) * (chunks * CHUNK) + first
        x_base = x + b * x_stride_b + start * x_stride_l + h * x_stride_h
        dy_base = dy + b * dy_stride_b + start * dy_stride_l + h * dy_stride_h
        x_jP = tl.load(
            x_base + j[:, None] * x_stride_l + p[None, :], mask=rows_j[:, None] & (p < P)[None, :], other=0.0
        )
        dy_iP = tl.load(
            dy_base + i[:, None] * dy_stride_l + p[None, :], mask=rows_i[:, None] & (p < P)[None, :], other=0.0
        )
        dt_j = tl.load(dt + vectors + j)
        decay_i, decay_j = tl.load(decay + vectors + i), tl.load(decay + vectors + j)

        d_weights = dot(x_jP, tl.trans(dy_iP), tl.zeros((ROWS, ROWS), tl.float32))
        if tile_i == tile_j:
            product_j = tl.sum(tl.where(same, d_weights, 0.0), axis=1)
            tl.store(product + vectors + j, product_j)
            tl.store(itself + vectors + j, CB_itself * product_j)
        d_weights = d_weights * tl.exp2(tl.minimum(decay_i[None, :] - decay_j[:, None], 0.0))
        d_CB += d_weights * dt_j[:, None]
        d_between = d_weights * CB
        tl.store(lost + tile_i.to(tl.int64) * part_stride + vectors + j, tl.sum(d_between, axis=1))
        tl.store(gained + tile_j.to(tl.int64) * part_stride + vectors + i, tl.sum(d_between * dt_j[:, None], axis=0))

    dCB_base = dCB + (((b * chunks + chunk) * groups + g) * blocks + block) * (CHUNK * CHUNK)
    tl.store(dCB_base + j[:, None] * CHUNK + i[None, :], tl.where(seen, d_CB, 0.0).to(dCB.dtype.element_ty))


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
    C_mN = total  # for dB there is no other use of it
    if C is not None:
        C_base = C + b * C_stride_b + start * C_stride_l + g * C_stride_g
        C_mN = tl.load(C_base + m[:, None] * C_stride_l + n[None, :], mask=own, other=0.0).to(tl.float32)

    for h in range(g * R, g * R + R):
        vectors = (b * H + h) * (chunks * CHUNK) + first
        x_base = x + b * x_stride_b + start * x_stride_l + h * x_stride_h
        x_mP = tl.load(x_base + m[:, None] * x_stride_l + p[None, :], mask=rows[:, None] & (p < P)[None, :], other=0.0)
        S_base = states + ((b * chunks + chunk) * H + h) * (N * P)
        S_NP = tl.load(S_base + n[:, None] * P + p[None, :], mask=(n < N)[:, None] & (p < P)[None, :], other=0.0)
        factor = tl.load(weight + vectors + m)
        if dt is not None:
            factor *= tl.load(dt + vectors + m)
        part = dot(x_mP, tl.trans(S_NP), tl.zeros((ROWS, BLOCK_N), tl.float32)) * factor[:, None]
        total += part
        if C is not None:
            tl.store(entered + tile_n.to(tl.int64) * entered_stride + vectors + m, tl.sum(part * C_mN, axis=1))

    other_base = other + b * other_stride_b + start * other_stride_l + g * other_stride_g
    other_kN = tl.load(
        other_base + k[:, None] * other_stride_l + n[None, :],
        mask=(first + k < L)[:, None] & (n < N)[None, :],
        other=0.0,
    )
    for block in range(BLOCKS):
        base = dCB + (((b * chunks + chunk) * groups + g) * BLOCKS + block) * (CHUNK * CHUNK)
        if C is not None:
            d_CB = tl.trans(tl.load(base + k[:, None] * CHUNK + m[None, :]))
        else:
            d_CB = tl.load(base + m[:, None] * CHUNK + k[None, :])
        total = dot(d_CB, other_kN, total)
    out_base = out + b * out_stride_b + start * out_stride_l + g * out_stride_g
    tl.store(out_base + m[:, None] * out_stride_l + n[None, :], total.to(out.dtype.element_ty), mask=own)
