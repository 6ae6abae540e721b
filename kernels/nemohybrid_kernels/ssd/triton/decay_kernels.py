"""Time steps and decays of every chunk, and their gradients.

Shapes: raw and its gradient [B, L, H]; all else [B, H, T], T = chunks * CHUNK, or [B, H, chunks]. Decays are logarithms to
base 2. A program has one chunk of HEADS heads, tiles [CHUNK, HEADS].
"""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import LOG2E, sigmoid, softplus


@triton.jit
def _time_steps(raw, at, inside, bias, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The steps at these places, 0 outside the row: there a state stays as it is."""
    dt = tl.load(raw + at, mask=inside, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    if LOW is not None:  # on a GPU, minimum and maximum would make a number of what is none
        dt = tl.where(dt < LOW, LOW, dt)
        dt = tl.where(dt > HIGH, HIGH, dt)
    return tl.where(inside, dt, 0.0)


@triton.jit
def _add_within_document(begins_left, sum_left, begins_right, sum_right):
    """Of neighbouring spans: the sum since the last document began in them."""
    return begins_left | begins_right, tl.where(begins_right != 0, sum_right, sum_left + sum_right)


@triton.jit
def ssd_decays(
    raw,
    bias,
    A,
    starts,
    dt_out,
    decay_out,
    enter_out,
    leave_out,
    chunk_decay_out,
    L,
    H,
    chunks,
    raw_stride_b,
    raw_stride_l,
    SOFTPLUS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """raw -> dt; `decay`, the sum of steps since the chunk or the document began; `enter` and `leave`, the factors of a
    state before the chunk on its way to a token, and of a token on its way to the end of the chunk; and of a state from
    before the chunk to its end. The factors are 0 where another document lies between.
    """
    chunk, h = tl.program_id(0) % chunks, tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    heads = h < H
    rate = tl.load(A + h, mask=heads, other=0.0) * LOG2E
    shift = (
        tl.load(bias + h, mask=heads, other=0.0).to(tl.float32) if bias is not None else tl.zeros((HEADS,), tl.float32)
    )

    l = first + q
    row = raw + b * raw_stride_b
    at = l.to(tl.int64)[:, None] * raw_stride_l + h[None, :]
    inside = (l < L)[:, None] & heads[None, :]
    dt = _time_steps(row, at, inside, shift[None, :], SOFTPLUS, LOW, HIGH)
    # The steps of the next tokens: what leaves is summed from the end, because differences of sums lose digits.
    next_inside = ((l + 1 < L) & (q + 1 < CHUNK))[:, None] & heads[None, :]
    later = _time_steps(row, at + raw_stride_l, next_inside, shift[None, :], SOFTPLUS, LOW, HIGH)

    step = dt * rate[None, :]
    leave = tl.exp2(tl.cumsum(later * rate[None, :], axis=0, reverse=True))
    if starts is not None:
        began = tl.load(starts + b * L + tl.minimum(l, L - 1))
        last = tl.load(starts + b * L + tl.minimum(first + CHUNK, L) - 1)
        begins = tl.broadcast_to((began == l).to(tl.int32)[:, None], (CHUNK, HEADS))
        _, decay = tl.associative_scan((begins, step), 0, _add_within_document)
        enter = tl.where((began < first)[:, None], tl.exp2(decay), 0.0)
        leave = tl.where((l >= last)[:, None], leave, 0.0)
        passes = (last < first).to(tl.float32)
    else:
        decay = tl.cumsum(step, axis=0)
        enter = tl.exp2(decay)
        passes = 1.0

    to = (b * H + h.to(tl.int64)) * (chunks * CHUNK) + first
    places = to[None, :] + q[:, None]
    mask = tl.broadcast_to(heads[None, :], (CHUNK, HEADS))
    tl.store(dt_out + places, dt, mask=mask)
    tl.store(decay_out + places, decay, mask=mask)
    tl.store(enter_out + places, enter, mask=mask)
    tl.store(leave_out + places, leave, mask=mask)
    tl.store(chunk_decay_out + (b * H + h) * chunks + chunk, tl.exp2(tl.sum(step, axis=0)) * passes, mask=heads)


@triton.jit
def _sum_of_parts(parts, count, stride, at, mask):
    """Partial sums that several programs left, added in their order."""
    total = tl.load(parts + at, mask=mask, other=0.0)
    for _ in range(1, count):
        parts += stride
        total += tl.load(parts + at, mask=mask, other=0.0)
    return total


@triton.jit
def ssd_decays_backward(
    raw,
    bias,
    A,
    dt,
    gained,
    lost,
    tile,
    product,
    itself,
    entered,
    entered_parts,
    left,
    passed,
    passed_parts,
    part_stride,
    passed_stride,
    d_raw,
    dA_out,
    dD_out,
    dbias_out,
    L,
    H,
    chunks,
    raw_stride_b,
    raw_stride_l,
    d_raw_stride_b,
    d_raw_stride_l,
    SOFTPLUS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Gradients of raw, and of A, D and the bias for each chunk, [B, chunks, H].

    A step s_k decays all that passes from before k to k or later: inside the chunk gained - lost, summed from k on; what
    entered at k or later; what left from tokens before k; and what passed through. What `ssd_pair_gradients` left in parts
    is there for pairs of tiles of `tile` tokens, the one of i not before the one of j.
    """
    chunk, h = tl.program_id(0) % chunks, tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, CHUNK)
    l = chunk * CHUNK + q
    heads = h < H
    mask = tl.broadcast_to(heads[None, :], (CHUNK, HEADS))
    at = ((b * H + h.to(tl.int64)) * (chunks * CHUNK) + chunk * CHUNK)[None, :] + q[:, None]

    here = tl.zeros((CHUNK, HEADS), tl.float32)
    lost_q = tl.zeros((CHUNK, HEADS), tl.float32)
    for part in range(0, CHUNK // tile):
        here += tl.load(gained + at, mask=mask & (q // tile >= part)[:, None], other=0.0)
        lost_q += tl.load(lost + at, mask=mask & (q // tile <= part)[:, None], other=0.0)
        gained += part_stride  # added, since the product with `part` can leave 32 bits
        lost += part_stride
    steps = tl.load(dt + at, mask=mask, other=0.0)
    here += _sum_of_parts(entered, entered_parts, part_stride, at, mask) - lost_q * steps
    left_q = tl.load(left + at, mask=mask, other=0.0)
    before = (q > 0)[:, None] & mask
    left_before = tl.load(left + at - 1, mask=before, other=0.0) * tl.load(dt + at - 1, mask=before, other=0.0)
    through = _sum_of_parts(passed, passed_parts, passed_stride, (b * H + h) * chunks + chunk, heads)
    d_step = tl.cumsum(here, axis=0, reverse=True) + tl.cumsum(left_before, axis=0) + through[None, :]

    rate = tl.load(A + h, mask=heads, other=0.0)
    d_dt = lost_q + left_q + tl.load(itself + at, mask=mask, other=0.0) + d_step * rate[None, :]
    inside = (l < L)[:, None] & mask
    of_chunk = (b * chunks + chunk) * H + h
    tl.store(dA_out + of_chunk, tl.sum(d_step * steps, axis=0), mask=heads)
    if dD_out is not None:
        tl.store(dD_out + of_chunk, tl.sum(tl.load(product + at, mask=mask, other=0.0), axis=0), mask=heads)

    row = l.to(tl.int64)[:, None]
    value = tl.load(raw + b * raw_stride_b + row * raw_stride_l + h[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + h, mask=heads, other=0.0).to(tl.float32)[None, :]
    if LOW is not None:
        step = softplus(value) if SOFTPLUS else value
        d_dt = tl.where((step >= LOW) & (step <= HIGH), d_dt, 0.0)
    if SOFTPLUS:
        d_dt = d_dt * sigmoid(value)
    d_dt = tl.where(inside, d_dt, 0.0)
    tl.store(d_raw + b * d_raw_stride_b + row * d_raw_stride_l + h[None, :], d_dt, mask=inside)
    if bias is not None:
        tl.store(dbias_out + of_chunk, tl.sum(d_dt, axis=0), mask=heads)
