"""Parts in plain PyTorch, for any device: scores are made for some queries at a time, in fp32, and never kept."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nemohybrid_kernels.attention.parts.keys import Keys, places

# B rows, H query heads, K key/value heads, R = H / K, L queries, n of them at a time, S keys, P head dim


def part_torch(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `nemohybrid_kernels.attention.parts.part_of_attention`."""
    out, sums = q.new_empty(q.shape, dtype=maths(q)), q.new_empty(q.shape[:3], dtype=maths(q))
    for place, rows in _at_once(q, keys):
        scores = _scores(rows, keys, place)
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0)[..., None])
        out[:, :, place] = torch.einsum("bkrns,bksp->bkrnp", weights, keys.v.to(rows.dtype)).flatten(1, 2)
        sums[:, :, place] = total.flatten(1, 2)
    return out, sums


def gradients_torch(q: Tensor, keys: Keys, out: Tensor, sums: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as of `nemohybrid_kernels.attention.parts.gradients_of_part`."""
    dq = torch.empty_like(q, dtype=maths(q))
    dk, dv = (torch.zeros_like(of, dtype=maths(q)) for of in (keys.k, keys.v))
    delta = (d_out.to(sums.dtype) * out.to(sums.dtype)).sum(-1)
    heads = keys.k.shape[1]
    for place, rows in _at_once(q, keys):
        scores = _scores(rows, keys, place)
        own = [x[:, :, place].unflatten(1, (heads, -1)).to(rows.dtype) for x in (sums, d_out, delta)]
        weights = torch.exp(scores - own[0][..., None])
        dv += torch.einsum("bkrns,bkrnp->bksp", weights, own[1])
        d_scores = weights * (torch.einsum("bkrnp,bksp->bkrns", own[1], keys.v.to(rows.dtype)) - own[2][..., None])
        if keys.softcap is not None:
            d_scores = d_scores * (1 - (scores.masked_fill(scores == -torch.inf, 0.0) / keys.softcap).square())
        dq[:, :, place] = (torch.einsum("bkrns,bksp->bkrnp", d_scores, keys.k.to(rows.dtype)) * keys.scale).flatten(
            1, 2
        )
        dk += torch.einsum("bkrns,bkrnp->bksp", d_scores, rows) * keys.scale
    return dq, dk, dv


def maths(q: Tensor) -> torch.dtype:
    """What a part is returned and joined in: fp32, or fp64 of fp64."""
    return torch.promote_types(q.dtype, torch.float32)


def _scores(rows: Tensor, keys: Keys, place: slice) -> Tensor:
    """Queries [B, K, R, n, P] of this place -> [B, K, R, n, S] in fp32 (fp64 of fp64); -inf where none may look."""
    scores = torch.einsum("bkrnp,bksp->bkrns", rows, keys.k.to(rows.dtype)) * keys.scale
    if keys.softcap is not None:
        scores = keys.softcap * torch.tanh(scores / keys.softcap)
    hidden = keys.hidden(place)
    return scores if hidden is None else scores.masked_fill(hidden[:, None, None], -torch.inf)


def _at_once(q: Tensor, keys: Keys) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries, as [B, K, R, n, P] in fp32."""
    rows = q.unflatten(1, (keys.k.shape[1], -1))
    for place in places(q.shape[2], q.shape[0] * q.shape[1] * keys.k.shape[2]):
        yield place, rows[:, :, :, place].to(maths(q))
