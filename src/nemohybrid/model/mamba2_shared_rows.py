"""The recurrence of Mamba-2 over rows whose tokens lie on several ranks (context parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.heads import by_rank, to_heads, to_tokens
from nemohybrid.parallel.context_parallel.moves import from_left
from nemohybrid.parallel.context_parallel.states import carried
from nemohybrid_kernels.ssd.final_state import ssd_final_state

if TYPE_CHECKING:
    from nemohybrid.model.mamba2 import Mamba2

# B rows, L tokens of a row on this rank, C conv channels, H heads, I inner, P head dim, N state, K taps


@dataclass(frozen=True)
class HeadsPart:
    """Which heads and groups compute: how many of them, from which head on, and the channels of the convolution."""

    heads: int
    groups: int
    first: int = 0
    channels: Tensor | None = None

    @classmethod
    def of(cls, mixer: Mamba2, group: Group, device: torch.device) -> HeadsPart:
        """This rank's. Groups that several ranks have count on each; their gradients add up with all others."""
        widths, ranks = mixer.in_proj.widths[1:4], group.size
        channels = torch.arange(sum(widths), device=device).split(widths)
        counts = (mixer.heads, mixer.groups, mixer.groups)
        own = [by_rank(x, count, group)[group.rank] for x, count in zip(channels, counts, strict=True)]
        heads = mixer.heads // ranks
        return cls(heads, max(1, mixer.groups // ranks), group.rank * heads, torch.cat(own))

    @property
    def own(self) -> slice:
        """Of the heads."""
        return slice(self.first, self.first + self.heads)


def by_heads(mixer: Mamba2, xbc: Tensor, dt: Tensor, seq: SequenceContext) -> Tensor:
    """xbc [B, L, C] before the convolution and raw dt [B, L, H] -> y [B, L, I], every rank with all tokens of its heads.

    The gate stays where it is: it meets y after its way back.
    """
    x, b, c = xbc.split(mixer.in_proj.widths[1:4], dim=-1)
    parts = [(x, mixer.heads), (b, mixer.groups), (c, mixer.groups), (dt, mixer.heads)]
    *convolved, dt = to_heads(parts, seq.context)
    part, documents = HeadsPart.of(mixer, seq.context, x.device), seq.documents(x.device)
    ids = None if documents is None else documents.ids
    y, _ = mixer.recurrence(torch.cat(convolved, -1), dt, ids, None, None, part)
    return to_tokens(y, seq.context)


def by_states(mixer: Mamba2, xbc: Tensor, dt: Tensor, seq: SequenceContext) -> Tensor:
    """As `by_heads`, every rank with all heads of its tokens: it begins with what the rank to the left ends with."""
    goes_on = seq.goes_on_from_left()
    conv = mixer.conv(xbc, seq.document_ids, _per_row(goes_on, from_left(_last_inputs(mixer, xbc, seq), seq.context)))[
        0
    ]
    dt = mixer.time_steps(dt)
    x, _, A, B, *_ = inputs = mixer.scan_inputs(conv, dt)
    left, decay = ssd_final_state(x, dt, A, B, seq.document_ids)
    came = carried(left, _per_row(goes_on, decay), seq.context)
    return mixer.scan(inputs, seq.document_ids, _per_row(goes_on, came))[0]


def _last_inputs(mixer: Mamba2, xbc: Tensor, seq: SequenceContext) -> Tensor:
    """[B, K - 1, C] what the convolution of the rank to the right begins with: inputs of the last document."""
    taps = mixer.conv.weight.shape[-1] - 1
    last = xbc[:, xbc.shape[1] - taps :]
    if seq.segments is None:
        return last
    return last * (seq.segments[:, xbc.shape[1] - taps :] == seq.segments[:, -1:])[..., None]


def _per_row(goes_on: Tensor | float, x: Tensor) -> Tensor:
    """x [B, ...], zeros in rows whose first document begins on this rank."""
    if not isinstance(goes_on, Tensor):
        return x * goes_on
    return x * goes_on.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
