"""One rank's share of a global batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """tokens, labels [n, L] int64; loss_mask [n, L] fp32; document_ids [n, L] int32, or None for one document a row."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; copies to a GPU overlap with what runs there."""
        ids = self.document_ids
        tokens, labels, mask = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.loss_mask))
        return Batch(tokens, labels, mask, None if ids is None else ids.to(device, non_blocking=True))

    def split(self, size: int) -> Iterator["Batch"]:
        """Microbatches of `size` sequences, in order."""
        for start in range(0, self.tokens.shape[0], size):
            part = slice(start, start + size)
            ids = None if self.document_ids is None else self.document_ids[part]
            yield Batch(self.tokens[part], self.labels[part], self.loss_mask[part], ids)
