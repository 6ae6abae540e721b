"""The calls whose kernels are compiled ahead of time: every entry of every configs.json is reached by one of them.

A case runs an operator's launchers forward and backward on meta tensors, to be recorded. Sizes are those of Nemotron-H-8B
(8192 tokens, 128 heads of 64 channels, 8 groups, state 128; arXiv 2504.03624, table 1) where not said otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels.ahead_of_time import Compilation, Resources, compilation_of
from nemohybrid_kernels.conv1d import triton as conv1d
from nemohybrid_kernels.launching import ARCHITECTURES, Recording, recording
from nemohybrid_kernels.mixer import triton as mixer
from nemohybrid_kernels.norm import triton as norm
from nemohybrid_kernels.ssd import triton as ssd

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """`run` calls launchers; `name` begins with that of the operator."""

    name: str
    run: Callable[[], object]

    def launches(self, architecture: int) -> Recording:
        with recording(architecture) as found:
            self.run()
        return found


@dataclass(frozen=True)
class Mixer:
    """Sizes of a Mamba-2 layer, or of a shard of one."""

    tokens: int = 8192
    heads: int = 128
    width: int = 64
    state: int = 128
    groups: int = 8
    taps: int = 4
    dtype: torch.dtype = BF16
    packed: bool = False

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def starts(self) -> Tensor | None:
        return self.new(1, self.tokens, dtype=torch.int32) if self.packed else None


def run_mixer(sizes: Mixer) -> None:
    """As in training: all parts of one row of the input projection, and of one row of its gradient."""
    zxbcdt = sizes.new(1, sizes.tokens, sizes.inner + sizes.convolved + sizes.heads)
    heads = partial(sizes.new, sizes.heads, dtype=FP32)
    weights = mixer.Weights(
        sizes.new(sizes.convolved, sizes.taps),
        sizes.new(sizes.convolved),
        heads(),
        heads(),
        heads(),
        sizes.new(sizes.inner),
        sizes.starts(),
    )
    group_size = sizes.inner // sizes.groups
    of_mixer = mixer.Sizes(sizes.heads, sizes.groups, sizes.state, group_size, 1e-5, None, None)
    out, y, rstd = mixer.forward(zxbcdt, weights, of_mixer)
    mixer.backward(out, zxbcdt, y, rstd, weights, of_mixer)


def run_conv(sizes: Mixer) -> None:
    """By itself, with inputs of a previous rank."""
    x = sizes.new(1, sizes.tokens, sizes.convolved)
    weight, bias = sizes.new(sizes.convolved, sizes.taps), sizes.new(sizes.convolved)
    given = x, weight, bias, sizes.starts(), sizes.new(1, sizes.taps - 1, sizes.convolved), True
    conv1d.backward(conv1d.forward(*given), *given)


def run_scan(sizes: Mixer) -> None:
    """By itself, with a state of a previous rank: contiguous inputs, dt after softplus."""
    x = sizes.new(1, sizes.tokens, sizes.heads, sizes.width)
    dt, A, D = sizes.new(1, sizes.tokens, sizes.heads, dtype=FP32), *(sizes.new(sizes.heads, dtype=FP32) for _ in "AD")
    B, C = (sizes.new(1, sizes.tokens, sizes.groups, sizes.state) for _ in "BC")
    initial = sizes.new(1, sizes.heads, sizes.width, sizes.state, dtype=FP32)
    call = ssd.Call(x, dt, A, B, C, D, None, sizes.starts(), initial)
    y, final = ssd.forward(call)
    ssd.backward(call, y, final)


def run_norm(size: int, dtype: torch.dtype = BF16, tokens: int = 8192) -> None:
    """The plain norm of a layer's input, `size` channels."""
    x, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((tokens, size), (size,)))
    y, rstd = norm.rms_forward(x, weight, 1e-5)
    norm.rms_backward(y, x, weight, rstd)


def _of_mixers(operator: str, run: Callable[[Mixer], None], **named: Mixer) -> list[Case]:
    return [Case(f"{operator} {name.replace('_', ' ')}", partial(run, sizes)) for name, sizes in named.items()]


CASES = [
    *_of_mixers(
        "mixer",
        run_mixer,
        whole=Mixer(),
        packed=Mixer(packed=True),
        one_of_8_ranks=Mixer(heads=16, groups=1),
        state_64=Mixer(state=64),
        state_256=Mixer(state=256),
        fp32=Mixer(dtype=FP32),
        fp32_state_256=Mixer(dtype=FP32, state=256),
    ),
    *_of_mixers("conv", run_conv, with_history=Mixer(packed=True), of_8_taps=Mixer(taps=8), fp32=Mixer(dtype=FP32)),
    *_of_mixers("ssd", run_scan, with_initial_state=Mixer(packed=True)),
    *(Case(f"norm of {size}", partial(run_norm, size)) for size in (4096, 8192, 16384)),
    Case("norm of 4096 fp32", partial(run_norm, 4096, FP32)),
]

TOLERATED = {
    (
        "ssd_scan",
        "fp32",
        "N=256",
    ): "fp32 with a state of 256 is for checks; its tiles of 16 tokens, the least, do not fit",
    ("ssd_pair_gradients", "fp32", "N=256"): "as ssd_scan",
    ("ssd_decays", "fp32", "CHUNK=128"): "only where the scan is called by itself with steps in fp32",
    ("norm_backward", "bf16", "BLOCK=16384"): "no published model has rows or groups of more than 8192 channels",
}
"""Kernels that spill registers all the same, and why: by name, type and a size."""


@dataclass(frozen=True)
class Binary:
    """A compilation that is shipped, the first case that wants it, and its place in the table (None: not from there)."""

    case: str
    entry: int | None
    compilation: Compilation

    @property
    def likeness(self) -> tuple[Any, ...]:
        """Binaries with the same differ in what is known of strides and lengths, and in whether there are documents."""
        of = self.compilation
        return of.kernel, of.architecture, of.dtype, self.entry, of.config.warps, of.config.stages, *of.sizes.items()

    def faults(self, found: Resources) -> list[str]:
        of = self.compilation
        return found.faults(of.architecture, of.dtype)

    @property
    def excuse(self) -> tuple[str, str, str] | None:
        """The line of TOLERATED under which it may spill."""
        of = self.compilation
        sizes = {f"{name}={value}" for name, value in of.sizes.items()}
        return next((key for key in TOLERATED if key[:2] == (of.name, of.dtype) and key[2] in sizes), None)


def binaries(
    architectures: Sequence[int], only: Sequence[str] = (), full: Sequence[int] = ARCHITECTURES
) -> list[Binary]:
    """Each once, those of which case and kernel hold all parts of `only`. Outside of `full`, one of those that are alike."""
    found: dict[str, Binary] = {}
    for architecture in architectures:
        alike: set[tuple[Any, ...]] = set()
        for case in CASES:
            for launch in case.launches(architecture):
                if not all(part in f"{case.name} {launch.kernel.__name__}" for part in only):
                    continue
                binary = Binary(case.name, launch.entry, compilation_of(launch, architecture))
                if architecture in full or binary.likeness not in alike:
                    found.setdefault(binary.compilation.key, binary)
                alike.add(binary.likeness)
    return list(found.values())
