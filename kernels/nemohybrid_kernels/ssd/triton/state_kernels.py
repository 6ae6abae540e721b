"""The states between chunks, forward in time, and their gradients, backward in time: the same loop.

states [B, chunks, H, N, P] in the inputs' type; a state is carried in fp32, and given and returned as [.., H, P, N] fp32.
"""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import dot


@triton.jit
def ssd_states(
    x,
    B,
    weight,
    dt,
    chunk_decay,
    initial,
    states,
    forward_states,
    passed,
    final,
    final_decay,
    L,
    H,
    chunks,
    segments,
    passed_stride,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    B_stride_b,
    B_stride_l,
    B_stride_g,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """state <- chunk_decay * state + sum_q weight_q dt_q B_q x_q^T over the chunks of a segment.

    The state before each chunk goes to `states`. REVERSE runs from the last chunk to the first; then x, B and weight are
    the gradient of y, C and `enter` (no dt), and what goes to `states` is the gradient of the state after each chunk; with
    `forward_states`, their product with it and the decay goes to `passed` [tiles, B, H, chunks].
    `final` [B, segments, H, P, N] gets the last state, final_decay [B, segments, H] the decay of the whole segment.
    A program has BLOCK_N x BLOCK_P of one head's state over one segment.
    """
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile, rest = tl.program_id(0) % (tiles_n * tiles_p), tl.program_id(0) // (tiles_n * tiles_p)
    h, rest = rest % H, rest // H
    segment, b = rest % segments, (rest // segments).to(tl.int64)
    n = (tile // tiles_p) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = (tile % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.arange(0, CHUNK)
    tile_mask = (n < N)[:, None] & (p < P)[None, :]

    per_segment = tl.cdiv(chunks, segments)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    vectors = (b * H + h) * chunks * CHUNK
    of_segment = ((b * segments + segment) * H + h) * (P * N)
    transposed = p[None, :] * N + n[:, None]
    if initial is not None:
        state = tl.load(initial + of_segment + transposed, mask=tile_mask, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    through = 1.0

    for step in range(0, last - first):
        chunk = (last - 1 - step) if REVERSE else (first + step)
        l = chunk * CHUNK + q
        rows = l < L
        decay = tl.load(chunk_decay + (b * H + h) * chunks + chunk)
        if states is not None:
            base = ((b * chunks + chunk) * H + h) * (N * P)
            at = n[:, None] * P + p[None, :]
            tl.store(states + base + at, state.to(states.dtype.element_ty), mask=tile_mask)
            if forward_states is not None:
                other = tl.load(forward_states + base + at, mask=tile_mask, other=0.0).to(tl.float32)
                product = tl.sum(tl.sum(state * other, axis=1), axis=0) * decay
                tl.store(passed + tile.to(tl.int64) * passed_stride + (b * H + h) * chunks + chunk, product)
        factor = tl.load(weight + vectors + chunk * CHUNK + q)
        if dt is not None:
            factor *= tl.load(dt + vectors + chunk * CHUNK + q)
        start = (chunk * CHUNK).to(tl.int64)
        x_base = x + b * x_stride_b + start * x_stride_l + h * x_stride_h
        B_base = B + b * B_stride_b + start * B_stride_l + (h // R) * B_stride_g
        x_QP = tl.load(x_base + q[:, None] * x_stride_l + p[None, :], mask=rows[:, None] & (p < P)[None, :], other=0.0)
        B_QN = tl.load(B_base + q[:, None] * B_stride_l + n[None, :], mask=rows[:, None] & (n < N)[None, :], other=0.0)
        scaled = (x_QP.to(tl.float32) * factor[:, None]).to(x_QP.dtype)
        state = dot(tl.trans(B_QN), scaled, state * decay)
        through *= decay

    tl.store(final + of_segment + transposed, state, mask=tile_mask)
    if final_decay is not None:
        tl.store(final_decay + (b * segments + segment) * H + h, through)


@triton.jit
def ssd_combine(ends, decays, initial, before, size, segments, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """From what each segment adds to a state of zeros, and how it decays one, to the state before each segment.

    ends and before [B, segments, H, size], decays [B, segments, H], initial [B, H, size], all fp32. A program has
    BLOCK entries of one head.
    """
    blocks = tl.cdiv(size, BLOCK)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    h, H = tl.program_id(1), tl.num_programs(1)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    mask = i < size
    if initial is not None:
        state = tl.load(initial + (b * H + h) * size + i, mask=mask, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, segments):
        segment = (segments - 1 - step) if REVERSE else step
        at = (b * segments + segment) * H + h
        tl.store(before + at * size + i, state, mask=mask)
        state = state * tl.load(decays + at) + tl.load(ends + at * size + i, mask=mask, other=0.0)
