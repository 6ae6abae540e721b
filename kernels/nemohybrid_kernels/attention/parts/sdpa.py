"""Parts by PyTorch's fused kernels.

Going back, a kernel makes the weights of its keys again, from their scores and the log of a sum, and takes off what the
result says. Given the sum and the result over all keys, and not over those it sees, what it returns are exactly the gradients
that these keys have in the whole attention.

They know documents only as a mask of all pairs, which is made for so many queries at a time. What they return for a query
that sees no key is theirs to choose, NaN for one, and dropped.

In bf16 every part is rounded before it is joined. On a CPU (8 heads over 2 of 64 channels, 2048 tokens as of 2 to 16 ranks,
errors against fp64 by norm) the result was off by up to 2.3e-3, dq by 2.9e-3, dk and dv by 7.5e-3; the same kernel over all
keys at once by 2.1e-3, 2.6e-3 and 7.4e-3, parts of the twin by 1.6e-3, 1.8e-3 and 1.7e-3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid_kernels.attention import sdpa
from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.parts.kernels import HALVES, How, Kernel, kernel_for
from nemohybrid_kernels.attention.parts.keys import Keys, places
from nemohybrid_kernels.attention.parts.reference import maths

# B rows, H query heads, K key/value heads, L queries, S keys, P head dim


def obstacle(case: Case, device: torch.device) -> str | None:
    """Why it cannot do `case` on `device`, or None."""
    if (reason := sdpa.obstacle(case, device)) is not None:
        return reason
    if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return "its kernels are known on CPUs and CUDA devices alone"
    if device.type == "cuda" and case.dtype not in (*HALVES, torch.float32):
        return f"fused attention takes bfloat16, float16 and float32, not {case.type_name}"
    return kernel_for(device, case.dtype, case.head_dim, case.packed).obstacle


def part(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `nemohybrid_kernels.attention.parts.part_of_attention`, softcap None."""
    out, sums = q.new_empty(q.shape, dtype=maths(q)), q.new_empty(q.shape[:3], dtype=maths(q))
    for run in _runs(q, keys):
        k, v = keys.k[:, :, run.seen], keys.v[:, :, run.seen]
        found = run.kernel.forward(q[:, :, run.queries], k, v, run.how)
        out[:, :, run.queries], sums[:, :, run.queries] = found
        if run.blind is not None:
            out[:, :, run.queries].masked_fill_(run.blind[..., None], 0.0)
            sums[:, :, run.queries].masked_fill_(run.blind, -torch.inf)
    return out, sums


def gradients(q: Tensor, keys: Keys, out: Tensor, sums: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as of `nemohybrid_kernels.attention.parts.gradients_of_part`, softcap None."""
    dq = torch.empty_like(q, dtype=maths(q))
    dk, dv = (torch.zeros_like(of, dtype=maths(q)) for of in (keys.k, keys.v))
    for run in _runs(q, keys):
        own, whole, d_whole = (x[:, :, run.queries].to(q.dtype) for x in (q, out, d_out))
        k, v, totals = keys.k[:, :, run.seen], keys.v[:, :, run.seen], sums[:, :, run.queries]
        found = run.kernel.backward(d_whole, own, k, v, whole, totals, run.how)
        dq[:, :, run.queries] = found[0]
        dk[:, :, run.seen] += found[1]
        dv[:, :, run.seen] += found[2]
    return dq, dk, dv


@dataclass(frozen=True)
class _Run:
    """Queries that are one call of a kernel, and the keys that they are given. blind [B, 1, L]: those that may look nowhere."""

    kernel: Kernel
    how: How
    queries: slice
    seen: slice
    blind: Tensor | None = None


def _runs(q: Tensor, keys: Keys) -> Iterator[_Run]:
    """All queries at once where nothing is masked, or nothing but later keys."""
    kernel = kernel_for(q.device, q.dtype, q.shape[-1], keys.packed)
    if not keys.packed:
        yield _Run(kernel, How(keys.scale, keys.causal), slice(None), slice(None))
        return
    for place in places(q.shape[2], q.shape[0] * keys.k.shape[2]):
        seen = slice(place.stop if keys.causal else None)
        hidden = keys.hidden(place)
        assert hidden is not None, "there are documents"
        hidden = hidden[:, None, :, seen]
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        from_first = keys.causal and place.start == 0  # then kernels know which keys are later, and leave them out
        yield _Run(kernel, How(keys.scale, from_first, bias), place, seen, hidden.all(-1))
