"""The documents of packed rows, in each of the forms that backends want, made once and when first asked for."""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels.documents import document_starts
from nemohybrid_kernels.lazy import lazy


class Documents:
    """Documents of the rows of a batch: ids [B, L], a document begins wherever the id differs from the one before."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    @lazy
    def starts(self) -> Tensor:
        """[B, L] int32: the position where each token's document begins; before the row for the first."""
        return document_starts(self.ids)

    @lazy
    def mask(self) -> Tensor:
        """[B, 1, L, L], True where a token may look."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device, dtype=torch.int32)
        return ((self.starts.unsqueeze(2) <= position) & (position <= position.unsqueeze(1))).unsqueeze(1)

    @lazy
    def bounds(self) -> Tensor:
        """[documents + 1] int32: where documents begin in the flattened rows, and their end. Waits for the device."""
        rows, length = self.ids.shape
        position = torch.arange(length, device=self.ids.device, dtype=torch.int32)
        begins = (self.starts == position) | (position == 0)
        ends = torch.full((1,), rows * length, device=self.ids.device)
        return torch.cat([begins.flatten().nonzero().flatten(), ends]).int()

    @lazy
    def blocks(self) -> Any:
        """The `BlockMask` of FlexAttention."""
        from nemohybrid_kernels.attention.blocks import block_mask

        return block_mask(self.starts)
