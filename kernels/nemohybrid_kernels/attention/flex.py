"""FlexAttention: blocks of tokens that see nothing of each other are skipped, and scores may be capped.

Compiled on GPUs; elsewhere it runs uncompiled, as slow as the reference, for tests.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nemohybrid_kernels import launching
from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.packing import Documents

BLOCK = 128
"""Tokens of a block; the compiled kernels want 128."""
NARROWEST = 16
"""Channels of a head: products in Triton have no fewer."""


def obstacle(case: Case, device: torch.device) -> str | None:
    """Why it cannot do `case` on `device`, or None."""
    if device.type != "cuda":
        return "FlexAttention is compiled for CUDA devices only"
    if case.head_dim < NARROWEST:
        return f"FlexAttention takes heads of {NARROWEST} channels and more, not of {case.head_dim}"
    if case.dtype == torch.float64:
        return "FlexAttention takes bfloat16, float16 and float32, not float64"
    return launching.obstacle(device)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Arguments and result as of `nemohybrid_kernels.attention.attention`, mask None."""
    blocks = _causal_blocks(q.shape[2], q.device) if documents is None else documents.blocks
    attend, options = _attend(q.device.type == "cuda")
    return attend(
        q,
        k,
        v,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=blocks,
        scale=scale,
        enable_gqa=k.shape[1] < q.shape[1],
        kernel_options=options,
    )


@cache
def _attend(compiled: bool) -> tuple[Any, dict[str, Any] | None]:
    """Short rows, too, take the kernels for long ones: those for decoding have their own rules."""
    if not compiled:
        return flex_attention, None
    return torch.compile(flex_attention, dynamic=False), {"FORCE_USE_FLEX_ATTENTION": True}


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """One function for each cap: every new one would be compiled again."""

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    return block_mask(torch.zeros(1, length, dtype=torch.int32, device=device))


def block_mask(starts: Tensor) -> BlockMask:
    """starts [B or 1, L] as of `document_starts` -> which blocks of keys each block of queries visits.

    Starts never decrease along a row, so two tokens of a block speak for all; no pair of single tokens is looked at, as
    `create_block_mask` would: at 128k tokens those are 17 thousand million. The host does not wait.
    """
    length = starts.shape[1]
    block = torch.arange(-(-length // BLOCK), device=starts.device, dtype=torch.int32)
    first, last = block * BLOCK, ((block + 1) * BLOCK - 1).clamp(max=length - 1)
    earliest, latest = starts[:, first.long(), None], starts[:, last.long(), None]  # [B, queries, 1]
    before, same = block < block[:, None], block == block[:, None]  # [queries, keys]
    whole = before & (first >= latest)
    partly = (before | same) & (last >= earliest) & ~whole
    (kv_count, kv), (full_count, full) = _listed(partly), _listed(whole)

    def sees(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (starts[b if len(starts) > 1 else 0, q] <= k) & (k <= q)

    return BlockMask.from_kv_blocks(
        kv_count, kv, full_count, full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(visited: Tensor) -> tuple[Tensor, Tensor]:
    """[B, queries, keys] -> how many keys each query visits, and which, those first: [B, 1, queries], [B, 1, queries, keys]."""
    order = visited.int().argsort(dim=-1, descending=True, stable=True)
    return visited.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1).contiguous()
