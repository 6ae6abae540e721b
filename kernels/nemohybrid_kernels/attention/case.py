"""What is asked of a backend of attention."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """`packed`: documents in a row; `masked`: a mask of the caller's own; `capped`: a softcap."""

    dtype: torch.dtype
    head_dim: int = 64
    packed: bool = False
    masked: bool = False
    capped: bool = False

    @property
    def type_name(self) -> str:
        """For messages."""
        return str(self.dtype).removeprefix("torch.")
