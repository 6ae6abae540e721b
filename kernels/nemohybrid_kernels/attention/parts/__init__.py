"""Attention over some of the keys, whose results for other keys can be joined to it: what a ring of ranks computes."""

from functools import partial

import torch
from torch import Tensor

from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.parts import sdpa
from nemohybrid_kernels.attention.parts.keys import Keys
from nemohybrid_kernels.attention.parts.reference import gradients_torch, part_torch
from nemohybrid_kernels.backend import Backend, Choice, decide

__all__ = ["Keys", "backends", "gradients_of_part", "join", "part_of_attention"]

# B rows, H query heads, K key/value heads, L queries, S keys, P head dim

GRADIENTS = {"sdpa": sdpa.gradients, "torch": gradients_torch}


def backends(case: Case) -> dict[str, Backend]:
    """Implementations, the preferred first: those of attention that say the log of the sum and can be told it."""
    return {"sdpa": Backend(sdpa.part, partial(sdpa.obstacle, case)), "torch": Backend(part_torch)}


def part_of_attention(q: Tensor, keys: Keys, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """q [B, H, L, P] -> the softmax over these keys times their values [B, H, L, P], and the log of its sum [B, H, L].

    In fp32 (fp64 of fp64), but fused kernels round the first to q's type; zeros and -inf for a query that may look at none of
    them. No gradients. Raises BackendError. Twin: `reference.part_torch`.
    """
    return _chosen(q, keys, backend).run(q, keys)


def join(out: Tensor, sums: Tensor, more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two results of `part_of_attention` over different keys -> that over all of them. The first must have seen some."""
    total = torch.logaddexp(sums, more[1])
    return out * torch.exp(sums - total)[..., None] + more[0] * torch.exp(more[1] - total)[..., None], total


def gradients_of_part(
    q: Tensor, keys: Keys, out: Tensor, sums: Tensor, d_out: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of these keys and values, in fp32 (fp64 of fp64), in the attention over all keys.

    out [B, H, L, P], sums [B, H, L]: its result over all keys, and the log of the sum over all. Fused kernels round what they
    return to q's type. Raises BackendError. Twin: `reference.gradients_torch`.
    """
    return GRADIENTS[_chosen(q, keys, backend).backend](q, keys, out, sums, d_out)


def _chosen(q: Tensor, keys: Keys, wanted: str) -> Choice:
    case = Case(q.dtype, q.shape[-1], keys.packed, capped=keys.softcap is not None)
    return decide("ring_attention", wanted, backends(case), q.device)
