"""Small facts about arguments that several operators need."""

import torch
from torch import Tensor

from nemohybrid_kernels.errors import ShapeError


def check_shape(name: str, tensor: Tensor | None, **sizes: int) -> None:
    """Raise ShapeError unless `tensor` (None passes) has these named sizes, in this order."""
    if tensor is not None and tuple(tensor.shape) != tuple(sizes.values()):
        expected = ", ".join(f"{dim}={size}" for dim, size in sizes.items())
        raise ShapeError(f"{name} has shape {list(tensor.shape)}, expected [{expected}]")


def check_divides(what: str, whole: int, parts_name: str, parts: int) -> None:
    """Raise ShapeError unless `whole` things (`what`) divide by `parts`, naming the nearest number that can."""
    if parts < 1 or whole % parts:
        legal = [n for n in range(1, whole + 1) if whole % n == 0]
        nearest = min(legal, key=lambda n: abs(n - parts))
        raise ShapeError(f"{whole} {what} cannot be divided by {parts_name}={parts}. Nearest legal: {nearest}")


def maths_dtype(x: Tensor) -> torch.dtype:
    """What an operator computes in where rounding to `x`'s type would hurt: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def document_runs(document_ids: Tensor) -> Tensor:
    """Number the documents of every row from 0 on: [B, L] ids, neither sorted nor unique, to [B, L] int64.

    A document starts wherever the id differs from the one before.
    """
    starts = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.nn.functional.pad(starts.long().cumsum(1), (1, 0))
