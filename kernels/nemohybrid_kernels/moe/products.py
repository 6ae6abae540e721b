"""Products of rows that are sorted by expert with the matrices of their experts, and the gradients of these matrices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels.moe.visits import Visits
from nemohybrid_kernels.opaque import opaque

# n rows, sorted by expert, and after them those of nobody; E experts; I, O features in and out


class Products(NamedTuple):
    """Two products that know which rows belong to which expert; both return new tensors of the rows' type."""

    rows: Callable[[Tensor, Tensor, Visits], Tensor]
    """rows [n, I], matrices [E, I, O] -> [n, O]: every row times the matrix of its expert. Rows of nobody: anything."""
    matrices: Callable[[Tensor, Tensor, Visits], Tensor]
    """left [n, O], right [n, I] -> [E, O, I]: left^T right over the rows of each expert; zero where it has none."""
    back: Callable[[Tensor, Tensor, Visits], Tensor] | None = None
    """As `rows`, for gradients of rows: where these are multiplied otherwise than rows."""

    def gradients(self, rows: Tensor, matrices: Tensor, visits: Visits) -> Tensor:
        """`back`, or `rows`."""
        return (self.back or self.rows)(rows, matrices, visits)


class Pair(NamedTuple):
    """The products with each of an expert's two matrices."""

    up: Products
    down: Products


def _rows_grouped(rows: Tensor, matrices: Tensor, visits: Visits) -> Tensor:
    return F.grouped_mm(rows, matrices, offs=visits.ends)


def _matrices_grouped(left: Tensor, right: Tensor, visits: Visits) -> Tensor:
    if not len(left):  # grouped_mm refuses a sum over nothing (github.com/pytorch/pytorch/pull/192497)
        return left.new_zeros(len(visits.ends), left.shape[1], right.shape[1])
    out = F.grouped_mm(left.T, right, offs=visits.ends)
    # On B200 an expert without rows got what the memory held before (github.com/pytorch/pytorch/issues/172439).
    empty = visits.ends.diff(prepend=visits.ends.new_zeros(1)) == 0
    return out.masked_fill_(empty[:, None, None], 0)


GROUPED_MM = Products(_rows_grouped, _matrices_grouped)
"""torch's grouped_mm: on GPUs one launch for all experts, whose loads stay on the device; on CPUs a loop in C++."""


def _rows_by_segments(rows: Tensor, matrices: Tensor, visits: Visits) -> Tensor:
    out = rows.new_empty(len(rows), matrices.shape[2])
    start = 0
    for count, matrix in zip(visits.counts, matrices.unbind(), strict=True):
        end = start + usual_height(count, rows.dtype)
        if end <= len(rows):  # surplus rows are those of later experts, who then write theirs, or of nobody
            torch.mm(rows[start:end], matrix, out=out[start:end])
        else:
            out[start:] = torch.mm(_pad(rows[start:], end - start), matrix)[: len(rows) - start]
        start += count
    return out


def _matrices_by_segments(left: Tensor, right: Tensor, visits: Visits) -> Tensor:
    out = left.new_empty(len(visits.ends), left.shape[1], right.shape[1])
    if visits.absent:
        left, right = left[: sum(visits.counts)], right[: sum(visits.counts)]
    segments = left.split(visits.counts), right.split(visits.counts), out.unbind()
    for of_left, of_right, result in zip(*segments, strict=True):
        height = usual_height(len(of_left), left.dtype)
        torch.mm(_pad(of_left, height).T, _pad(of_right, height), out=result)  # no rows give zeros
    return out


def usual_height(rows: int, dtype: torch.dtype) -> int:
    """`rows`, for bf16 rounded up by a sixteenth at most, or to a multiple of 32.

    oneDNN, which multiplies bf16 on CPUs, compiles a kernel for every new shape: 0.6 to 0.9 ms, ten times what the product
    takes in small models, and the loads of experts are new in every step. docs/benchmarks/moe_experts.md has figures.
    """
    if dtype != torch.bfloat16:
        return rows
    step = max(32, 1 << rows.bit_length() >> 5)
    return -(-rows // step) * step


def _pad(rows: Tensor, height: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, height - len(rows))) if height > len(rows) else rows


SEGMENTS = Products(_rows_by_segments, _matrices_by_segments)
"""Expert by expert into one tensor: any type and width. It needs the loads on the host."""


def _like_rows(rows: Tensor, matrices: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(len(rows), matrices.shape[2])


def _like_matrices(left: Tensor, right: Tensor, ends: Tensor, *_: Any) -> Tensor:
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


@opaque("expert_rows", like=_like_rows)
def _rows_unseen(rows: Tensor, matrices: Tensor, ends: Tensor, absent: bool) -> Tensor:
    visits = _sorted_by(ends, absent)
    return products_for(rows.dtype, tuple(matrices.shape[1:]), rows.device).rows(rows, matrices, visits)


@opaque("expert_matrices", like=_like_matrices)
def _matrices_unseen(left: Tensor, right: Tensor, ends: Tensor, absent: bool) -> Tensor:
    visits = _sorted_by(ends, absent)
    return products_for(left.dtype, (left.shape[1], right.shape[1]), left.device).matrices(left, right, visits)


def _sorted_by(ends: Tensor, absent: bool) -> Visits:
    """Visits whose order nobody asks for."""
    nothing = ends[:0]
    return Visits(nothing, nothing, ends, 1, absent)


UNSEEN = Products(
    lambda rows, matrices, visits: _rows_unseen(rows, matrices, visits.ends, visits.absent),
    lambda left, right, visits: _matrices_unseen(left, right, visits.ends, visits.absent),
)
"""Those of CPUs for torch.compile, which knows grouped_mm in bf16 only, and no loop whose length is in a tensor."""


def products_for(dtype: torch.dtype, widths: tuple[int, ...], device: torch.device) -> Products:
    """The faster ones: on CPUs grouped_mm in fp32 where it takes the widths, and our own loop else."""
    if device.type == "cpu" and torch.compiler.is_compiling():
        return UNSEEN
    aligned = not any(width * dtype.itemsize % 16 for width in widths)
    return GROUPED_MM if device.type != "cpu" or (dtype == torch.float32 and aligned) else SEGMENTS


def obstacle(dtype: torch.dtype, widths: tuple[int, ...], device: torch.device) -> str | None:
    """Why `F.grouped_mm` cannot multiply rows of these widths on a GPU without waiting for the host, or None.

    As in torch 2.11 to 2.13: bf16, rows of a multiple of 16 bytes, and Hopper or later; for other types and older GPUs it
    copies the loads to the host and loops there.
    """
    multiple = 16 // dtype.itemsize
    if dtype != torch.bfloat16:
        return f"grouped_mm multiplies bfloat16 there, the experts compute in {str(dtype).removeprefix('torch.')}"
    if uneven := [width for width in widths if width % multiple]:
        return f"grouped_mm needs widths that are multiples of {multiple}; {uneven[0]} is none"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 else f"grouped_mm needs compute capability 9.0, it has {major}.{minor}"
