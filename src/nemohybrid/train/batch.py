"""One rank's share of a global batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemohybrid.model.mtp import shifted
from nemohybrid.model.sequence import SequenceContext

# n sequences, L length


@dataclass(frozen=True)
class Batch:
    """tokens, labels [n, L] int64; loss_mask [n, L] fp32; document_ids [n, L] int32, or None for one document a row.

    eod: the id that ends a document, where documents are kept apart. It alone can tell whether the label of a row's last
    token belongs to the next document; None: it belongs to the same one.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    document_ids: Tensor | None
    eod: int | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; copies to a GPU overlap with what runs there."""
        ids = self.document_ids
        tokens, labels, mask = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.loss_mask))
        return Batch(tokens, labels, mask, None if ids is None else ids.to(device, non_blocking=True), self.eod)

    def split(self, size: int) -> Iterator["Batch"]:
        """Microbatches of `size` sequences, in order."""
        for start in range(0, self.tokens.shape[0], size):
            part = slice(start, start + size)
            ids = None if self.document_ids is None else self.document_ids[part]
            yield replace(
                self,
                tokens=self.tokens[part],
                labels=self.labels[part],
                loss_mask=self.loss_mask[part],
                document_ids=ids,
            )

    def sequence(self, share: float | None = None) -> SequenceContext:
        """What layers are told of these rows. `share`: what part of a global batch they are, in training."""
        return SequenceContext(*self.tokens.shape, document_ids=self.document_ids, share=share)

    def draft_targets(self, depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each MTP depth k = 0, 1, ... its labels [n, L] and their mask [n, L] fp32.

        Position t of depth k has seen tokens t + 1 ... t + k + 1 beside those up to t, and predicts labels[t + k + 1]. It
        counts where all of these and the label lie in the document of token t, and `loss_mask` keeps the label.
        """
        goes_on = self._goes_on()
        within = goes_on
        for by in range(1, depths + 1):
            within = within & shifted(goes_on, by)
            yield shifted(self.labels, by), within * shifted(self.loss_mask, by)

    def _goes_on(self) -> Tensor:
        """[n, L] True where a token's label belongs to its document."""
        ids, last = self.document_ids, self.tokens[:, -1:]
        inner = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool) if ids is None else ids[:, 1:] == ids[:, :-1]
        return torch.cat([inner, torch.ones_like(last, dtype=torch.bool) if self.eod is None else last != self.eod], 1)
