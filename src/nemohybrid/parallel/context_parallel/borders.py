"""Where documents begin in rows whose tokens lie on several ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid.parallel.collectives import gathered
from nemohybrid.parallel.context import Group

# B rows, L tokens of a row on this rank, c ranks


@dataclass(frozen=True)
class Borders:
    """segments [B, L] int32: the number of each token's document in its whole row, counted from 0.

    begins [B, L] int64: where in the whole row that document begins. goes_on [B]: whether this rank's first token belongs to
    the document of the token before it, which the rank to the left has.
    """

    segments: Tensor
    begins: Tensor
    goes_on: Tensor


def whole_rows(values: Tensor, group: Group) -> Tensor:
    """values [B, L] of every rank's tokens -> [B, c L]. No gradients."""
    return gathered(values[None], group).movedim(0, 1).flatten(1)


def borders(ids: Tensor, group: Group) -> Borders:
    """Of document ids [B, L], which change wherever a document begins and may come back. Collective."""
    length, index = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
    inner = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
    numbers = inner.cumsum(1)
    latest = torch.where(inner, index, -1).cummax(1).values  # -1 before the first border on this rank
    edges = torch.stack([ids[:, 0].long(), ids[:, -1].long(), numbers[:, -1], latest[:, -1]])
    first, last, counts, latest_of = gathered(edges[None], group).unbind(1)  # [c, B] each
    goes_on = torch.cat([torch.zeros_like(first[:1], dtype=torch.bool), first[1:] == last[:-1]])
    here = torch.arange(group.size, device=ids.device)[:, None] * length
    begun = torch.where(latest_of >= 0, here + latest_of, torch.where(goes_on, -1, here)).cummax(0).values
    starts = (~goes_on).long().cumsum(0) - 1  # of whole ranks, the row's own beginning being number 0
    before = starts + counts.cumsum(0) - counts
    rank, own = group.rank, group.rank * length
    came = torch.where(goes_on[rank], begun[max(rank - 1, 0)], own)
    return Borders(
        segments=(numbers + before[rank][:, None]).int(),
        begins=torch.where(latest >= 0, own + latest, came[:, None]),
        goes_on=goes_on[rank],
    )
