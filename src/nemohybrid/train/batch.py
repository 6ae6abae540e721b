"""One rank's share of a global batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.context_parallel.moves import shifted

# n sequences, L length


@dataclass(frozen=True)
class Batch:
    """tokens, labels [n, L] int64; loss_mask [n, L] fp32; document_ids [n, L] int32, or None for one document a row.

    eod: the id that ends a document, where documents are kept apart. It alone can tell whether the label of a row's last
    token belongs to the next document; None: it belongs to the same one. context: the ranks that share the rows, where these
    are one rank's tokens of them.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    document_ids: Tensor | None
    eod: int | None = None
    context: Group = Group()

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; copies to a GPU overlap with what runs there."""
        ids = self.document_ids
        tokens, labels, mask = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.loss_mask))
        ids = None if ids is None else ids.to(device, non_blocking=True)
        return replace(self, tokens=tokens, labels=labels, loss_mask=mask, document_ids=ids)

    def shared_by(self, context: Group) -> "Batch":
        """This rank's tokens of rows that ranks share: an equal run of each, [n, ceil(L / (2 ranks)) * 2].

        Rows that do not divide end in tokens that do not count.
        """
        if context.size == 1:
            return self
        length = -(-self.tokens.shape[1] // (2 * context.size)) * 2
        missing, own = (
            length * context.size - self.tokens.shape[1],
            slice(context.rank * length, (context.rank + 1) * length),
        )

        def cut(values: Tensor) -> Tensor:
            return F.pad(values, (0, missing))[:, own].contiguous()

        ids = self.document_ids
        if ids is not None:  # what fills up is of the last document: where that ends is for `eod` to say
            ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)[:, own].contiguous()
        tokens, labels, mask = cut(self.tokens), cut(self.labels), cut(self.loss_mask)
        return Batch(tokens, labels, mask, ids, self.eod, context)

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
        return SequenceContext(*self.tokens.shape, document_ids=self.document_ids, share=share, context=self.context)

    def draft_targets(self, depths: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each MTP depth k = 0, 1, ... its labels [n, L] and their mask [n, L] fp32.

        Position t of depth k has seen tokens t + 1 ... t + k + 1 beside those up to t, and predicts labels[t + k + 1]. It
        counts where all of these and the label lie in the document of token t, and `loss_mask` keeps the label.
        """
        if not depths:
            return  # and asks other ranks for nothing
        within = goes_on = self._goes_on()
        for by in range(1, depths + 1):
            within = within & shifted(goes_on, by, self.context)
            yield shifted(self.labels, by, self.context), within * shifted(self.loss_mask, by, self.context)

    def _goes_on(self) -> Tensor:
        """[n, L] True where a token's label belongs to its document."""
        ids = self.document_ids
        goes_on = (
            torch.ones_like(self.tokens, dtype=torch.bool) if ids is None else ids == shifted(ids, 1, self.context)
        )
        if self.context.rank == self.context.size - 1:
            goes_on[:, -1:] = True
        return goes_on if self.eod is None else goes_on & (self.tokens != self.eod)
