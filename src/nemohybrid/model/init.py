"""First values of logical tensors, and how a whole model gets them.

Every block of rows of a logical tensor draws from a generator of its own, seeded by (run seed, logical name, block): the
values do not depend on the order of construction, the number of ranks, or how tensors are fused and cut.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from nemohybrid.parallel.layout import Box, Init, attach, layout_of, local, logical_name

BLOCK_ELEMENTS = 2**22
"""Of a large logical tensor; smaller ones are one block."""


def normal(std: float) -> Init:
    """Gaussian with mean 0."""
    return lambda generator, shape: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Init:
    """The same value everywhere."""
    return lambda generator, shape: torch.full(shape, value)


def uniform(bound: float) -> Init:
    """Uniform in [-bound, bound]."""
    return lambda generator, shape: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def log_uniform_A(low: float = 1.0, high: float = 16.0) -> Init:
    """`A_log` = log U(low, high), so that A = -exp(A_log) (Mamba-2 and Megatron-LM)."""
    return lambda generator, shape: (torch.rand(shape, generator=generator) * (high - low) + low).log()


def inverse_softplus_dt(dt_min: float, dt_max: float, floor: float) -> Init:
    """`dt_bias` whose softplus is log-uniform in [dt_min, dt_max] and at least `floor` (Mamba-2 and Megatron-LM)."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        spread = math.log(dt_max) - math.log(dt_min)
        dt = (torch.rand(shape, generator=generator) * spread + math.log(dt_min)).exp().clamp(min=floor)
        return dt + torch.log(-torch.expm1(-dt))

    return draw


def generator_for(seed: int, name: str, block: int = 0) -> torch.Generator:
    """The random stream of one block of rows of one logical tensor."""
    text = f"{seed}/{name}" + (f"/{block}" if block else "")
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter and buffer of a meta model uninitialised memory on `device`; layouts stay what they are."""
    layouts = {name: layout_of(tensor) for name, tensor in model.named_parameters()}
    model.to_empty(device=device)
    for name, tensor in model.named_parameters():
        attach(tensor, layouts[name])


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw every parameter of a materialised model; buffers are zeroed (the balancing bias of a router starts at 0)."""
    for name, tensor in model.named_parameters():
        stored = local(tensor)
        for box in layout_of(tensor).boxes:
            draw(box, box.of(stored), seed, logical_name(name, box.piece))
    for buffer in model.buffers():
        buffer.zero_()


def draw(box: Box, target: Tensor, seed: int, name: str) -> None:
    """Fill `target` with the first values of a box of the logical tensor `name`.

    Only blocks of rows that the box touches are drawn, one at a time, and all columns of them: a rank that holds some rows
    of a large model draws little more, one that holds some columns draws those of its peers too.
    """
    piece, first, end = box.piece, box.offsets[0], box.offsets[0] + box.shape[0]
    rows, filled = block_rows(piece.shape), piece.shape[0] if piece.filled is None else piece.filled
    columns = tuple(slice(start, start + n) for start, n in zip(box.offsets[1:], box.shape[1:], strict=True))
    target[max(0, filled - first) :].zero_()
    end = min(end, filled)
    for begin in range(first // rows * rows, end, rows) if first < end else ():
        stop = min(begin + rows, filled)
        values = piece.init(generator_for(seed, name, begin // rows), (stop - begin, *piece.shape[1:]))
        low, high = max(begin, first), min(stop, end)
        target[low - first : high - first].copy_(values[(slice(low - begin, high - begin), *columns)])


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of a logical tensor that are drawn together; part of what its values are, so it never changes."""
    return max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
