"""First values of logical tensors, and how a whole model gets them.

Every logical tensor draws from a generator of its own, seeded by (run seed, logical name): the values do not depend on
the order of construction, the number of ranks, or how tensors are fused and cut.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from nemohybrid.parallel.layout import Init, attach, layout_of, logical_name


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


def padded(init: Init, rows: int) -> Init:
    """`init` for the first `rows` rows and zeros below, so that the padding changes none of the values that count."""

    def draw(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([init(generator, (rows, *shape[1:])), torch.zeros(shape[0] - rows, *shape[1:])])

    return draw


def generator_for(seed: int, name: str) -> torch.Generator:
    """The random stream of one logical tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter and buffer of a meta model uninitialised memory on `device`.

    `Module.to_empty` would do, but it makes new parameters and drops their layouts.
    """
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty_like(tensor, device=device))
            setattr(module, name, attach(empty, layout_of(tensor)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Draw every parameter of a materialised model; buffers are zeroed (the balancing bias of a router starts at 0)."""
    for name, tensor in model.named_parameters():
        for piece, view in layout_of(tensor).views(tensor):
            view.copy_(piece.init(generator_for(seed, logical_name(name, piece)), piece.shape))
    for buffer in model.buffers():
        buffer.zero_()
