"""What a scan leaves behind, without the scan: one product of all tokens, for ranks that share a sequence."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 4096
"""Of which operands in fp32 are held at a time."""

# b rows, L tokens, H heads, P head dim, G groups, N state


def ssd_final_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state after the last token of a scan that begins with zeros, and by what a state before it would be multiplied.

    x [b, L, H, P], dt [b, L, H] after softplus, A [H] negative, B [b, L, G, N], document_ids [b, L] as of `ssd_scan` ->
    [b, H, P, N] and [b, H], fp32 (fp64 of an fp64 x). Where a document begins among these tokens the second is 0.
    Decays are summed up from the end, where they matter most. Differentiable in x, dt, A and B.
    """
    logs = dt * A
    after = logs.flip(1).cumsum(1).flip(1)
    weights = torch.exp(after - logs) * dt
    decay = torch.exp(after[:, 0])
    if document_ids is not None:
        begins = torch.cat([torch.zeros_like(document_ids[:, :1]), document_ids[:, 1:] != document_ids[:, :-1]], 1)
        behind = begins.flip(1).cumsum(1).flip(1) - begins  # documents that begin after a token
        weights = weights * (behind == 0)[..., None]
        decay = decay * (behind[:, 0] == 0)[:, None]
    return _WeightedSum.apply(x, weights, B), decay  # pyright: ignore[reportReturnType]


class _WeightedSum(Function):
    """sum over t of weights_t x_t B_t^T, [b, H, P, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, B)
        b, _, H, P = x.shape
        total = weights.new_zeros(b, B.shape[2], H // B.shape[2], P, B.shape[3])
        for own, of, keys in _runs(x, weights, B):
            total += torch.einsum("blgrp,blgn->bgrpn", own * of[..., None], keys)
        return total.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights, B = ctx.saved_tensors
        d_state = gradients[0].unflatten(1, (B.shape[2], -1))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for own, of, keys in _runs(x, weights, B):
            d_weighted = torch.einsum("bgrpn,blgn->blgrp", d_state, keys)
            d_keys = torch.einsum("bgrpn,blgrp->blgn", d_state, own * of[..., None])
            dx = (d_weighted * of[..., None]).flatten(2, 3).to(x.dtype)
            parts.append((dx, (d_weighted * own).sum(-1).flatten(2, 3), d_keys.to(B.dtype)))
        return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def _runs(x: Tensor, weights: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x [b, l, G, R, P], weights [b, l, G, R] and B [b, l, G, N] of some tokens at a time, in the type of the weights."""
    groups = B.shape[2]
    for first in range(0, x.shape[1], TOKENS_AT_ONCE):
        place = slice(first, first + TOKENS_AT_ONCE)
        own, of = (of[:, place].to(weights.dtype).unflatten(2, (groups, -1)) for of in (x, weights))
        yield own, of, B[:, place].to(weights.dtype)
