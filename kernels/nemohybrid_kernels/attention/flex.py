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
from nemohybrid_kernels.attention.blocks import block_mask
from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.packing import Documents

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
