"""Attention in plain PyTorch: all scores are made, and kept for the backward pass."""

import torch
from torch import Tensor

from nemohybrid_kernels.attention.packing import Documents


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Arguments and result as of `nemohybrid_kernels.attention.attention`. Scores and softmax are fp32."""
    groups, length, past_and_now = k.shape[1], q.shape[2], k.shape[2]
    maths = torch.promote_types(q.dtype, torch.float32)
    rows = q.unflatten(1, (groups, -1)).flatten(2, 3)  # the heads of a group side by side: keys are not repeated
    scores = rows.to(maths) @ k.to(maths).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(*q.shape[:2], length, past_and_now)
    weights = scores.masked_fill(~allowed(q, documents, mask), -torch.inf).softmax(-1).to(v.dtype)
    return (weights.view(*rows.shape[:3], past_and_now) @ v).view(q.shape)


def allowed(q: Tensor, documents: Documents | None, mask: Tensor | None) -> Tensor:
    """True where a token of q may look, broadcastable to [B, H, L, S]."""
    if mask is not None:
        return mask
    if documents is not None:
        return documents.mask
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril_()
