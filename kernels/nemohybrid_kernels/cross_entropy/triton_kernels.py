"""Cross entropy of logits that are at hand: statistics of every row, and the gradient in place of the logits.

A row is a token's, of `width` columns; V of them are logits and the rest is padding. Labels count columns, and may be none.
"""

import triton
import triton.language as tl

from nemohybrid_kernels.jit import LOG2E

LEAST = tl.constexpr(float("-inf"))


@triton.jit
def cross_entropy_rows(logits, labels, out, V, stride, out_stride, BLOCK: tl.constexpr):
    """out [3, n] fp32: the largest logit of a row, the sum of exp(logit - largest), and the label's logit or 0.

    A program has a row and reads it once; the sum so far is scaled whenever a larger logit turns up.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([], LEAST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + columns, mask=columns < V, other=0.0).to(tl.float32)
        value = tl.where(columns < V, value, LEAST)
        larger = tl.maximum(top, tl.max(value, axis=0))
        base = tl.where(larger == LEAST, 0.0, larger)  # infinity less infinity would be no number
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((value - base) * LOG2E), axis=0)
        top = larger
    label = tl.load(labels + row)
    here = (label >= 0) & (label < V)
    own = tl.load(logits + row * stride + tl.where(here, label, 0), mask=here, other=0.0)
    tl.store(out + row, top)
    tl.store(out + out_stride + row, total)
    tl.store(out + 2 * out_stride + row, own.to(tl.float32))


@triton.jit
def cross_entropy_gradient(
    logits, labels, norm, dlosses, V, width, blocks, stride, norm_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits become dloss (exp(logit - norm[0]) / norm[1] - onehot(label)), and padding zero. norm [2, n] fp32.

    A program has BLOCK columns of a row, which has `blocks` programs.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(norm + row)
    dloss = tl.load(dlosses + row)
    scale = dloss / tl.load(norm + norm_stride + row)
    at = logits + row * stride + columns
    value = tl.load(at, mask=columns < V, other=0.0).to(tl.float32)
    value = tl.where(columns < V, value, LEAST)
    labelled = (columns == tl.load(labels + row)) & (columns < V)
    gradient = tl.exp2((value - top) * LOG2E) * scale - tl.where(labelled, dloss, 0.0)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=columns < width)
