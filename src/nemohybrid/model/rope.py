"""Rotary position embedding (Su et al. 2021), in the half-split form of GPT-NeoX and Llama."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn channel pairs (i, i + P/2) by position * theta^(-2i/P).

    x [B, heads, L, P], P even; positions [B, L]. Angles are fp32; the result has x's shape and dtype.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    left, right = x.float().split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
