"""Which blocks of tokens see each other, as FlexAttention wants to know it."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block; the compiled kernels want 128."""


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
