"""The causal convolution walks down strips of channels, so that every input is read once and converted once.

A program has BLOCK_C channels and a span of tokens, and holds the last K-1 inputs in registers: a tile of tokens would
have to read, or compute, its shifted copies K times. It takes UNROLL tokens at a time, whose loads are all under way
before the first is used. In a `window` of K-1 tiles the oldest comes first; tap k looks K-1-k tokens back.

Masks are a bound on c that is C or 0: a scalar condition in an `&` comes out of the interpreter as integers.

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
    batch, first, c = _place(strips, spans, span, BLOCK_C)
    if starts is not None:
        starts += batch * L
    x += batch * x_stride_b
    taps, offset = _filter(weight, bias, c, C, K, BLOCK_C)
    window = _before(x, initial, first, batch, x_stride_l, c, C, K)
    x_at = x + first.to(tl.int64) * x_stride_l + c
    y_at = y + batch * y_stride_b + first.to(tl.int64) * y_stride_l + c
    for step in range(0, tl.minimum(span, L - first), UNROLL):
        t = first + step
        rows = _tokens(x_at, x_stride_l, t, L, c, C, UNROLL)
        begins = _starts_of(starts, t, L, UNROLL)
        for u in tl.static_range(UNROLL):
            seen = _seen(window, rows[u].to(tl.float32), begins, t + u, u, K)
            out = _sum_of_taps(seen, taps, offset, K)
            if SILU:
                out *= sigmoid(out)
            tl.store(y_at + u * y_stride_l, out.to(y.dtype.element_ty), mask=c < tl.where(t + u < L, C, 0))
            window += (rows[u].to(tl.float32),)
            window = window[1:]
        x_at += UNROLL * x_stride_l
        y_at += UNROLL * y_stride_l


@triton.jit
def conv1d_backward(
    dy, x, weight, bias, starts, initial, dx, d_initial, partial, L, C, span, spans, strips,
    dy_stride_b, dy_stride_l, x_stride_b, x_stride_l, dx_stride_b, dx_stride_l,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dx [B, L, C], d_initial [B, K-1, C] and partial [B * spans, K+1, C] fp32: a span's share of dweight, then dbias.

    `pending` are the gradients of the last K-1 inputs so far. They are complete only K-1 tokens behind the span.
    """
    batch, first, c = _place(strips, spans, span, BLOCK_C)
    if starts is not None:
        starts += batch * L
    if d_initial is not None:
        d_initial += batch * (K - 1) * C + c
    x += batch * x_stride_b
    end = tl.minimum(first + span, L)
    taps, offset = _filter(weight, bias, c, C, K, BLOCK_C)
    window = _before(x, initial, first, batch, x_stride_l, c, C, K)
    pending, sums = _zeros(K - 1, BLOCK_C), _zeros(K + 1, BLOCK_C)
    x_at = x + first.to(tl.int64) * x_stride_l + c
    dy_at = dy + batch * dy_stride_b + first.to(tl.int64) * dy_stride_l + c
    dx_at = dx + batch * dx_stride_b + (first - (K - 1)).to(tl.int64) * dx_stride_l + c
    steps = tl.cdiv(end - first, UNROLL) * UNROLL
    for step in range(0, steps, UNROLL):
        window, pending, sums = _backward_step(
            window, pending, sums, dy_at, x_at, dx_at, dy_stride_l, x_stride_l, dx_stride_l,
            taps, offset, starts, d_initial, first + step, first, end, L, c, C, K, SILU, UNROLL,
        )  # fmt: skip
        x_at += UNROLL * x_stride_l
        dy_at += UNROLL * dy_stride_l
        dx_at += UNROLL * dx_stride_l
    _backward_step(
        window, pending, sums, dy_at, x_at, dx_at, dy_stride_l, x_stride_l, dx_stride_l,
        taps, offset, starts, d_initial, first + steps, first, end, L, c, C, K, SILU, K - 1,
    )  # fmt: skip
    partial += (batch * spans + first // span) * (K + 1) * C + c
    for k in tl.static_range(K + 1):
        tl.store(partial + k * C, sums[k], mask=c < C)


@triton.jit
def _backward_step(
    window, pending, sums, dy_at, x_at, dx_at, dy_stride, x_stride, dx_stride,
    taps, offset, starts, d_initial, t, first, end, L, c, C,
    K: tl.constexpr, SILU: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Tokens t .. t + COUNT - 1, after which the inputs K-1 places before them have all of their gradients."""
    rows = _tokens(x_at, x_stride, t, L, c, C, COUNT)
    gradients = _tokens(dy_at, dy_stride, t, L, c, C, COUNT)
    begins = _starts_of(starts, t, L, COUNT)
    for u in tl.static_range(COUNT):
        seen = _seen(window, rows[u].to(tl.float32), begins, t + u, u, K)
        g = _before_activation(gradients[u].to(tl.float32), seen, taps, offset, K, SILU)
        sums = _added(sums, seen, g, K)
        pending = _spread(pending, taps, g, begins, t + u, u, K)
        _store_input(dx_at + u * dx_stride, d_initial, pending[0], t + u - (K - 1), first, end, c, C, K)
        pending = pending[1:]
        window += (rows[u].to(tl.float32),)
        window = window[1:]
    return window, pending, sums


@triton.jit
def _place(strips, spans, span, BLOCK_C: tl.constexpr):
    """Batch row, first token of the span, channels of the strip. Neighbours share rows of x."""
    program = tl.program_id(0)
    c = (program % strips) * BLOCK_C + tl.arange(0, BLOCK_C)
    others = program // strips
    return (others // spans).to(tl.int64), others % spans * span, c


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
        value = tl.load(x + s.to(tl.int64) * stride + c, mask=c < tl.where(s >= 0, C, 0), other=0.0).to(tl.float32)
        if initial is not None:
            history = initial + (batch * (K - 1) + s + K - 1) * C + c
            value += tl.load(history, mask=c < tl.where(s < 0, C, 0), other=0.0).to(tl.float32)
        window += (value,)
    return window


@triton.jit
def _tokens(at, stride, t, L, c, C, COUNT: tl.constexpr):
    """COUNT tokens from t on, which `at` points to: zeros behind the row."""
    rows = ()
    for u in tl.static_range(COUNT):
        rows += (tl.load(at + u * stride, mask=c < tl.where(t + u < L, C, 0), other=0.0),)
    return rows


@triton.jit
def _starts_of(starts, t, L, COUNT: tl.constexpr):
    """Where the documents of COUNT tokens begin. Those behind the row see nothing of it."""
    begins = ()
    if starts is not None:
        for u in tl.static_range(COUNT):
            begins += (tl.load(starts + t + u, mask=t + u < L, other=2**30),)
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
def _before_activation(g, seen, taps, offset, K: tl.constexpr, SILU: tl.constexpr):
    """The gradient of a token's sum of taps, from that of its output."""
    if SILU:
        out = _sum_of_taps(seen, taps, offset, K)
        s = sigmoid(out)
        g *= s * (1.0 + out * (1.0 - s))
    return g


@triton.jit
def _store_input(at, d_initial, value, s, first, end, c, C, K: tl.constexpr):
    """The gradient of the input at position s, if it is the span's, or in front of the row."""
    tl.store(at, value.to(at.dtype.element_ty), mask=c < tl.where((s >= first) & (s < end), C, 0))
    if d_initial is not None:
        value = value.to(d_initial.dtype.element_ty)
        tl.store(d_initial + (s + K - 1).to(tl.int64) * C, value, mask=c < tl.where(s < 0, C, 0))


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
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
