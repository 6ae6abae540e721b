"""From all heads of some tokens to all tokens of some heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.moves import dealt

# B rows, L tokens of a row on this rank, c ranks

Heads = tuple[Tensor, int]
"""[B, L, channels] and how many heads, or groups of them, the channels are."""


def to_heads(parts: Sequence[Heads], group: Group) -> list[Tensor]:
    """Several [B, L, channels] -> of each [B, c L, own], all tokens in order and the channels of this rank's heads.

    Sent all at once. Differentiable.
    """
    spread = [by_rank(x, count, group) for x, count in parts]
    came = dealt(torch.cat(spread, -1).movedim(2, 0), group)  # [c, B, L, own of all parts]
    return list(came.movedim(0, 1).flatten(1, 2).split([part.shape[-1] for part in spread], -1))


def to_tokens(x: Tensor, group: Group) -> Tensor:
    """x [B, c L, own] of this rank's heads, of which no other rank has one -> [B, L, c own]: all heads of its tokens."""
    came = dealt(x.unflatten(1, (group.size, -1)).movedim(1, 0), group)
    return came.movedim(0, 2).flatten(2, 3)


def by_rank(x: Tensor, count: int, group: Group) -> Tensor:
    """x [..., channels of `count` heads] -> [..., c, own]: which channels each rank takes.

    Ranks share the heads, or repeat them where there are fewer heads than ranks. Groups of heads lie with their heads, as long
    as these divide by the ranks, and the groups by the ranks or the ranks by the groups.
    """
    if count % group.size == 0:
        return x.unflatten(-1, (group.size, -1))
    assert group.size % count == 0, f"{count} heads cannot be shared by {group.size} ranks"
    rank = torch.arange(group.size, device=x.device)
    return x.unflatten(-1, (count, -1)).index_select(-2, rank * count // group.size)
