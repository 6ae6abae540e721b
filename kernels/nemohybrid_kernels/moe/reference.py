"""The experts of a mixture in plain PyTorch: sort the rows by expert, loop over the experts, gather the rows back."""

from collections.abc import Callable

import torch
from torch import Tensor

from nemohybrid_kernels.moe.visits import arrange, restore, sort_by_expert, spread

# T tokens, D hidden, K experts of a token, E experts, F width of an expert


def expert_mlp_torch(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
    absent: bool = False,
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.moe.expert_mlp`. Experts without tokens run too, on empty rows."""
    T, K = expert_ids.shape
    visits = sort_by_expert(expert_ids, len(up), absent)
    counts = visits.counts
    nobody = [T * K - sum(counts)] if absent else []
    rows = spread(x, visits).split(counts + nobody)
    weights = arrange(expert_weights.reshape(T * K, 1), visits).split(counts + nobody)
    outputs = []
    # `unbind` and `split`: indexing one expert out would cost a full tensor of zeros per expert in the backward.
    matrices = up.to(x.dtype).unbind(), down.to(x.dtype).unbind()
    for r, w, up_FD, down_DF in zip(rows[: len(up)], weights[: len(up)], *matrices, strict=True):
        hidden = activation(r @ up_FD.T) * w
        outputs.append(hidden.to(x.dtype) @ down_DF.T)
    outputs += [x.new_zeros(count, x.shape[1]) for count in nobody]
    return restore(torch.cat(outputs), visits).view(T, K, x.shape[1]).sum(1)
