"""The experts of a mixture in plain PyTorch: sort the rows by expert, loop over the experts, gather the rows back.

Dimensions: T tokens, D hidden, K experts of a token, E experts, F width of an expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def expert_mlp_torch(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Arguments and result as in `nemohybrid_kernels.moe.expert_mlp`. Experts without tokens run too, on empty rows."""
    T, K = expert_ids.shape
    order, place, counts = _sort_by_expert(expert_ids, len(up))
    rows = _take_rows(x, order // K, place, K)
    weights = _take_rows(expert_weights.reshape(T * K, 1), order, place, 1)
    outputs = []
    # `unbind` and `split`: indexing one expert out would cost a full tensor of zeros per expert in the backward.
    for r, w, up_FD, down_DF in zip(rows.split(counts), weights.split(counts), up.unbind(), down.unbind(), strict=True):
        hidden = activation(r @ up_FD.T) * w
        outputs.append(hidden.to(x.dtype) @ down_DF.T)
    return _take_rows(torch.cat(outputs), place, order, 1).view(T, K, x.shape[1]).sum(1)


def _sort_by_expert(expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """The T*K visits in order of expert, where each visit lands in that order, and the visits of each expert."""
    visits = expert_ids_TK.flatten()
    order = visits.argsort(stable=True)
    return order, order.argsort(), visits.bincount(minlength=experts).tolist()


class _TakeRows(torch.autograd.Function):
    """rows[index], every row taken `copies` times. The backward gathers too: index_add is not deterministic on GPUs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (place,) = grads, ctx.saved_tensors
        taken = grad.index_select(0, place)
        return taken.view(-1, ctx.copies, taken.shape[1]).sum(1), None, None, None


def _take_rows(rows: Tensor, index: Tensor, place: Tensor, copies: int) -> Tensor:
    """rows [n, D] -> rows[index] [n * copies, D]; copy c of row i stands at place[i * copies + c]."""
    return _TakeRows.apply(rows, index, place, copies)  # pyright: ignore[reportReturnType]
