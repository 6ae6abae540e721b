"""The binaries that are shipped: those that the calls of `calls.py` lead to, and what is let pass of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemohybrid_kernels.ahead_of_time import Compilation, Resources, compilation_of
from nemohybrid_kernels.calls import CASES

FP32_OF_256 = "fp32 with a state of 256 is for checks; its tiles of 16 tokens, the least there are, do not fit"

TOLERATED = {
    ("ssd_scan", "fp32", "N=256"): FP32_OF_256,
    ("ssd_pair_gradients", "fp32", "N=256"): FP32_OF_256,
    ("norm_backward", "bf16", "BLOCK=8192"): "32 bytes, where all of 8192 channels are one group of a gated norm",
    ("norm_backward", "bf16", "BLOCK=16384"): "no published hybrid has rows or groups of more than 8192 channels",
}
"""Kernels that spill registers all the same, and why: by name, type and a size."""


@dataclass(frozen=True)
class Binary:
    """A compilation that is shipped, the first case that wants it, and its place in the table (None: not from there)."""

    case: str
    entry: int | None
    compilation: Compilation

    def faults(self, found: Resources) -> list[str]:
        of = self.compilation
        return found.faults(of.architecture, of.dtype)

    @property
    def excuse(self) -> tuple[str, str, str] | None:
        """The line of TOLERATED under which it may spill."""
        of = self.compilation
        sizes = {f"{name}={value}" for name, value in of.sizes.items()}
        return next((key for key in TOLERATED if key[:2] == (of.name, of.dtype) and key[2] in sizes), None)


def binaries(architectures: Sequence[int], only: Sequence[str] = ()) -> list[Binary]:
    """Each once, those of which case and kernel hold all parts of `only`."""
    found: dict[str, Binary] = {}
    for architecture in architectures:
        for case in CASES:
            for launch in case.launches(architecture):
                if all(part in f"{case.name} {launch.kernel.__name__}" for part in only):
                    binary = Binary(case.name, launch.entry, compilation_of(launch, architecture))
                    found.setdefault(binary.compilation.key, binary)
    return list(found.values())
