"""The middle of a Mamba-2 mixer in plain PyTorch, operator by operator."""

import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels.checks import maths_dtype
from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch
from nemohybrid_kernels.norm.reference import gated_rms_norm
from nemohybrid_kernels.ssd.reference import ssd_chunked


def mamba2_mixer_torch(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    *,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
    eps: float,
    document_ids: Tensor | None = None,
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.mixer.mamba2_mixer`."""
    inner, shared = len(norm_weight), groups * state
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * shared, heads], dim=-1)
    xbc, _ = causal_conv1d_torch(xbc, conv_weight, conv_bias, document_ids=document_ids)
    x, B, C = xbc.split([inner, shared, shared], dim=-1)
    maths = maths_dtype(zxbcdt)
    steps = F.softplus(dt.to(maths) + dt_bias.to(maths))
    y, _ = ssd_chunked(
        x.unflatten(-1, (heads, -1)),
        steps if dt_limit is None else steps.clamp(*dt_limit),
        A,
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        D,
        document_ids=document_ids,
        chunk_size=chunk_size,
    )
    return gated_rms_norm(y.flatten(2), z, norm_weight, group_size=group_size, eps=eps)
