"""`kernels`: which implementation of each operator runs. Results agree up to rounding, so a resumed run may have others."""

from dataclasses import dataclass
from typing import Any

from nemohybrid.config.section import Section, option
from nemohybrid_kernels.names import BACKENDS


def _backend(operator: str, what: str) -> Any:
    return option("auto", what, choices=("auto", *BACKENDS[operator]))


@dataclass
class KernelsSection(Section):
    """Which implementation of each operator runs; auto: the first that can here, and the log says why."""

    mixer_backend: str = _backend(
        "mixer", "all between the projections of Mamba-2; triton, cpp: one operator; separate: one after another"
    )
    mixer_recompute: bool = option(
        False, "in its backward pass triton's one operator makes convolution and states again: less memory, more time"
    )
    ssd_backend: str = _backend("ssd", "the scan of Mamba-2")
    conv1d_backend: str = _backend("conv1d", "the convolution of Mamba-2")
    attention_backend: str = _backend("attention", "attention; sdpa: what PyTorch has, cuDNN first")
    norm_backend: str = _backend("norm", "RMS norms, gated and plain")
    activation_backend: str = _backend(
        "activation", "squared ReLU; that of experts is a part of them where moe_backend is triton"
    )
    cross_entropy_backend: str = _backend("cross_entropy", "output projection and loss; plain: all logits at once")
    moe_backend: str = _backend("moe", "the experts")
    canary: str = option(
        "auto",
        "comparing fused kernels with their twins before the first step; auto: once for each machine and version",
        choices=("auto", "always", "skip"),
    )
