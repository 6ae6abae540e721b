"""What several Triton kernels share. Imported only where Triton is installed.

Rules that all kernels keep: offsets are int64; every tile is computed on in fp32 and rounded to its input's type just
before a product; sums have a fixed order, nothing is added by atomics.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. fp32 operands go through the tensor cores as three TF32 products, exact to 1e-6.

    The interpreter multiplies the bits of bf16 as integers and says nothing, so there operands are made fp32 first.
    """
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    """log(1 + e^x), to the last digits at both ends: log1p as u = 1 + t, log(u) t / (u - 1) (Higham 2002, section 1.14.1)."""
    t = tl.exp2(-tl.abs(x) * LOG2E)
    u = 1.0 + t
    log1p = tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p
