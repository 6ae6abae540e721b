"""The causal convolution walks down strips of channels, so that every input is read once and converted once.

A program has BLOCK_C channels and a span of tokens, and holds the last K-1 inputs in registers: a tile of tokens would
have to read, or compute, its shifted copies K times. It takes UNROLL tokens at a time, whose loads are all under way
before the first is used. In a `window` of K-1 tiles the oldest comes first; tap k looks K-1-k tokens back.

B batch, L length, C channels, K taps; starts [B, L]: a token at t sees position s if starts[t] <= s.
"""

# Tuples that grow and loops that unroll are Triton's, and its types do not describe them.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from nemohybrid_kernels.jit import sigmoid


@triton.jit
def conv1d_forward(
    x, weight, bias, starts, initial, y, L, C, span, spans, strips,
    x_stride_b, x_stride_l, y_stride_b, y_stride_l,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y [B, L, C]; a program for every row, span and strip."""
    batch, number, c = _place(strips, spans, C, BLOCK_C)
    x += batch * x_stride_b
    y += batch * y_stride_b
    if starts is not None:
        starts += batch * L
    first = number * span
    taps, offset = _filter(weight, bias, c, C, K, BLOCK_C)
    window = _before(x, initial, first, batch, x_stride_l, c, C, K)
    for step in range(0, tl.minimum(span, L - first), UNROLL):
        t = first + step
        rows = _tokens(x, t, L, x_stride_l, c, C, UNROLL)
        begins = _starts_of(starts, t, L, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = _seen(window, rows[u].to(tl.float32), begins, t + u, u, K)
            out = _sum_of_taps(seen, taps, offset, K)
            if SILU:
                out *= sigmoid(out)
            keep = _those(c, C, t + u < L)
            tl.store(y + (t + u).to(tl.int64) * y_stride_l + c, out.to(y.dtype.element_ty), mask=keep)
            window = _shifted(window, rows[u].to(tl.float32), K)


@triton.jit
def conv1d_backward(
    dy, x, weight, bias, starts, initial, dx, d_initial, partial, L, C, span, spans, strips,
    dy_stride_b, dy_stride_l, x_stride_b, x_stride_l, dx_stride_b, dx_stride_l,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx [B, L, C], d_initial [B, K-1, C] and partial [B * spans, K+1, C] fp32: a span's share of dweight, then dbias.

    A span also walks over the K-1 tokens behind it, whose outputs its last inputs reach. `pending` are the gradients of
    the last K-1 inputs, so far.
    """
    batch, number, c = _place(strips, spans, C, BLOCK_C)
    dy += batch * dy_stride_b
    x += batch * x_stride_b
    dx += batch * dx_stride_b
    if starts is not None:
        starts += batch * L
    if d_initial is not None:
        d_initial += batch * (K - 1) * C
    first = number * span
    end = tl.minimum(first + span, L)
    taps, offset = _filter(weight, bias, c, C, K, BLOCK_C)
    window = _before(x, initial, first, batch, x_stride_l, c, C, K)
    pending, sums = _zeros(K - 1, BLOCK_C), _zeros(K + 1, BLOCK_C)
    for step in range(0, end - first + K - 1, UNROLL):
        t = first + step
        rows = _tokens(x, t, L, x_stride_l, c, C, UNROLL)
        gradients = _tokens(dy, t, L, dy_stride_l, c, C, UNROLL)
        begins = _starts_of(starts, t, L, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = _seen(window, rows[u].to(tl.float32), begins, t + u, u, K)
            g = gradients[u].to(tl.float32)
            if SILU:
                g *= _silu_slope(_sum_of_taps(seen, taps, offset, K))
            sums = _added(sums, seen, tl.where(t + u < end, g, 0.0), K)
            pending = _spread(pending, taps, tl.where(t + u < L, g, 0.0), begins, t + u, u, K)
            done = t + u - (K - 1)
            keep = _those(c, C, (done >= first) & (done < end))
            tl.store(dx + done.to(tl.int64) * dx_stride_l + c, pending[0].to(dx.dtype.element_ty), mask=keep)
            if d_initial is not None:
                value = pending[0].to(d_initial.dtype.element_ty)
                tl.store(d_initial + (done + K - 1).to(tl.int64) * C + c, value, mask=_those(c, C, done < 0))
            pending = pending[1:]
            window = _shifted(window, rows[u].to(tl.float32), K)
    partial += (batch * spans + number) * (K + 1) * C + c
    for k in tl.static_range(K + 1):
        tl.store(partial + k * C, sums[k], mask=c < C)


@triton.jit
def _place(strips, spans, C, BLOCK_C: tl.constexpr):
    """Batch row, number of the span, channels of the strip. Neighbours share rows of x."""
    program = tl.program_id(0)
    c = (program % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    others = program // strips
    return (others // spans).to(tl.int64), others % spans, c


@triton.jit
def _those(c, C, there):
    """The channels that exist, or none of them. As a bound, since the interpreter spoils a scalar `there` in an `&`."""
    return c < tl.where(there, C, 0)


@triton.jit
def _filter(weight, bias, c, C, K: tl.constexpr, BLOCK_C: tl.constexpr):
    taps = ()
    for k in tl.static_range(K):
        taps += (tl.load(weight + c * K + k, mask=c < C, other=0.0).to(tl.float32),)
    offset = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def _before(x, initial, first, batch, stride, c, C, K: tl.constexpr):
    """The window in front of token `first`: inputs, or before the row those of `initial`, or zeros."""
    window = ()
    for j in tl.static_range(K - 1):
        s = first - (K - 1) + j
        value = tl.load(x + s.to(tl.int64) * stride + c, mask=_those(c, C, s >= 0), other=0.0).to(tl.float32)
        if initial is not None:
            history = initial + (batch * (K - 1) + s + K - 1) * C + c
            value += tl.load(history, mask=_those(c, C, s < 0), other=0.0).to(tl.float32)
        window += (value,)
    return window


@triton.jit
def _tokens(x, t, L, stride, c, C, UNROLL: tl.constexpr):
    rows = ()
    for u in tl.static_range(UNROLL):
        rows += (tl.load(x + (t + u).to(tl.int64) * stride + c, mask=_those(c, C, t + u < L), other=0.0),)
    return rows


@triton.jit
def _starts_of(starts, t, L, UNROLL: tl.constexpr):
    begins = ()
    if starts is not None:
        for u in tl.static_range(UNROLL):
            begins += (tl.load(starts + t + u, mask=t + u < L, other=0),)
    return begins


@triton.jit
def _seen(window, x, begins, t, u: tl.constexpr, K: tl.constexpr):
    """What the K taps of token t see: zeros where another document is. Zeros, not 0 * x, which may be infinite."""
    seen = ()
    for k in tl.static_range(K - 1):
        if len(begins) == 0:
            seen += (window[k],)
        else:
            seen += (tl.where(t - (K - 1) + k >= begins[u], window[k], 0.0),)
    seen += (x,)
    return seen


@triton.jit
def _sum_of_taps(seen, taps, offset, K: tl.constexpr):
    for k in tl.static_range(K):
        offset += taps[k] * seen[k]
    return offset


@triton.jit
def _silu_slope(x):
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _shifted(window, x, K: tl.constexpr):
    window += (x,)
    return window[1:]


@triton.jit
def _zeros(count: tl.constexpr, BLOCK_C: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros += (tl.zeros([BLOCK_C], tl.float32),)
    return zeros


@triton.jit
def _added(sums, seen, g, K: tl.constexpr):
    """The sums of weight and bias gradients with those of one more token."""
    added = ()
    for k in tl.static_range(K):
        added += (sums[k] + g * seen[k],)
    added += (sums[K] + g,)
    return added


@triton.jit
def _spread(pending, taps, g, begins, t, u: tl.constexpr, K: tl.constexpr):
    """The gradients of the K inputs up to token t, after its own."""
    spread = ()
    for k in tl.static_range(K - 1):
        reaches = g
        if len(begins) > 0:
            reaches = tl.where(t - (K - 1) + k >= begins[u], g, 0.0)
        spread += (pending[k] + taps[k] * reaches,)
    spread += (taps[K - 1] * g,)
    return spread
