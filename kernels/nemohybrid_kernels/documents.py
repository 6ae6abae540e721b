"""Where the documents of packed rows begin, as kernels want to know it: one number a token."""

import torch
from torch import Tensor

BEFORE_THE_ROW = -(2**30)
"""Where the first document of a row began: an initial state and the inputs before the row are its own."""


def document_starts(document_ids: Tensor) -> Tensor:
    """[B, L] ids, neither sorted nor unique -> [B, L] int32: the position where each token's document begins.

    Token t sees position s, in the row or before it, exactly if document_starts[t] <= s <= t.
    """
    position = torch.arange(document_ids.shape[1], device=document_ids.device, dtype=torch.int32)
    begins = torch.nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return torch.where(begins, position, BEFORE_THE_ROW).cummax(1).values
