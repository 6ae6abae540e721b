"""flash-attn 2, 3 and 4, by their functions for sequences of different lengths: each document is one.

How much they differ is in `Flash`; what they share is a layout, [tokens, heads, channels] without rows, and `cu_seqlens`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid_kernels import packages
from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.packing import Documents

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Flash:
    """One of the packages. `architectures`: major compute capabilities it has kernels for; None: 8 and all later."""

    name: str
    module: str
    advice: str
    widest: int
    architectures: tuple[int, ...] | None
    caps: bool


FLASH2 = Flash("flash-attn 2", "flash_attn", "pip install 'nemohybrid[flash]'", 256, None, caps=True)
FLASH3 = Flash(
    "flash-attn 3",
    "flash_attn_interface",
    "build it: folder hopper/ of Dao-AILab/flash-attention",
    256,
    (9,),
    caps=True,
)
FLASH4 = Flash(
    "flash-attn 4", "flash_attn.cute", "pip install --pre flash-attn-4", 128, (9, 10), caps=False
)  # a cap has no gradient in some of its pre-releases


def obstacle(flash: Flash, case: Case, device: torch.device) -> str | None:
    """Why it cannot do `case` on `device`, or None."""
    if case.dtype not in HALVES:
        return f"{flash.name} takes bfloat16 and float16, not {case.type_name}"
    if case.head_dim > flash.widest or case.head_dim % 8:
        return f"{flash.name} takes heads of up to {flash.widest} channels, in eights, not of {case.head_dim}"
    if case.capped and not flash.caps:
        return f"{flash.name} has no gradient of a softcap in every release"
    return packages.cuda_obstacle(flash.module, flash.advice, device) or _too_old(flash, device)


def _too_old(flash: Flash, device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    fits = major in flash.architectures if flash.architectures else major >= 8
    return None if fits else f"{flash.name} has no kernels for compute capability {major}.{minor}"


def run(
    flash: Flash,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Arguments and result as of `nemohybrid_kernels.attention.attention`, mask None.

    The longest document is taken to be as long as a row: to know better, the host would have to wait.
    """
    (B, _, L, _) = q.shape
    bounds = _rows(B, L, q.device) if documents is None else documents.bounds
    attend = packages.load(flash.module, flash.advice).flash_attn_varlen_func
    out = attend(
        *(heads.transpose(1, 2).flatten(0, 1) for heads in (q, k, v)),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=L,
        max_seqlen_k=L,
        softmax_scale=scale,
        causal=True,
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return packages.first(out).unflatten(0, (B, L)).transpose(1, 2)


def _rows(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (rows + 1) * length, length, device=device, dtype=torch.int32)
