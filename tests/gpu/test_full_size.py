"""Our kernels at the sizes of published models, and on rows so long that offsets do not fit into 32 bits.

Values and all gradients are held to the twin in float64. On a CPU the same code runs at tiny sizes, in the interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from operator_calls import (
    Rows,
    at_the_end,
    conv_call,
    experts_call,
    gated_norm_call,
    loss_call,
    mixer_call,
    norm_call,
    on_devices,
    scan_call,
    squared_relu_call,
)

from nemohybrid_kernels.calls import FP32, Experts, Mixer
from nemohybrid_kernels.canary import Case, KernelMismatch, check

TINY = Mixer(tokens=37, heads=2, width=16, state=16, groups=1, dtype=FP32, packed=True)
TINY_ROWS, TINY_EXPERTS = Rows(9, 64, FP32), Experts(tokens=13, hidden=16, width=16, per_token=2, dtype=FP32)
INT32 = 2**31


@dataclass(frozen=True)
class Full:
    """`make(sizes)` is called on a GPU, `make(tiny)` on a CPU; without it, only on a GPU."""

    make: Callable[[Any], Case]
    sizes: Any
    tiny: Any = None

    def at(self, device: str) -> Any:
        return self.sizes if device == "cuda" else self.tiny


FULL = {
    "mixer of Nemotron-H-8B": Full(mixer_call, Mixer()),
    "mixer of packed rows": Full(mixer_call, Mixer(packed=True), TINY),
    "mixer that recomputes": Full(mixer_call, Mixer(recompute=True)),
    "mixer in fp32": Full(mixer_call, Mixer(dtype=FP32)),
    "mixer of Nemotron-H-4B": Full(mixer_call, Mixer(heads=112)),
    "mixer of one of 8 ranks": Full(mixer_call, Mixer(heads=16, groups=1)),
    "scan from a state": Full(scan_call, Mixer(packed=True), TINY),
    "convolution": Full(conv_call, Mixer(packed=True), TINY),
    "norm": Full(norm_call, Rows(8192, 4096), TINY_ROWS),
    "gated norm": Full(gated_norm_call, Rows(8192, 8192), TINY_ROWS),
    "squared ReLU": Full(squared_relu_call, Rows(8192, 21504), TINY_ROWS),
    "experts of Nemotron-3-Nano": Full(experts_call, Experts(), TINY_EXPERTS),
    "loss": Full(loss_call, Rows(4096, 131072, inner=4096), TINY_ROWS),
}


@dataclass(frozen=True)
class Long:
    """A row of `tokens` that ends as `end`; `of_token`: entries of one token in its widest tensor.

    last: how many tokens have a gradient; None: all of the end, which is a document of its own, or in which no token sees
    another.
    """

    end: Full
    tokens: int
    of_token: int
    names: tuple[str, ...]
    axis: int = 0
    last: int | None = None


OF_MIXER, OF_SCAN = ("zxbcdt", "document_ids"), ("x", "dt", "B", "C", "document_ids")
OF_EXPERTS = ("x", "expert_ids", "expert_weights")
END, PACKED_END = Mixer(tokens=1200), Mixer(tokens=1200, packed=True)
LONG = {
    "mixer": Long(Full(mixer_call, END), 131_079, 18560, OF_MIXER, 1, 400),
    "mixer of packed rows": Long(Full(mixer_call, PACKED_END, TINY), 131_079, 18560, OF_MIXER, 1),
    "scan": Long(Full(scan_call, END, replace(TINY, tokens=60, packed=False)), 270_001, 8192, OF_SCAN, 1, 20),
    "scan of packed rows": Long(Full(scan_call, PACKED_END), 270_001, 8192, OF_SCAN, 1),
    "convolution": Long(Full(conv_call, PACKED_END, TINY), 215_003, 10240, ("x", "document_ids"), 1),
    "norm": Long(Full(norm_call, Rows(300, 4096), TINY_ROWS), 540_001, 4096, ("x",)),
    "gated norm": Long(Full(gated_norm_call, Rows(300, 8192), TINY_ROWS), 270_001, 8192, ("x", "z")),
    "squared ReLU": Long(Full(squared_relu_call, Rows(300, 21504), TINY_ROWS), 100_001, 21504, ("h",)),
    "experts": Long(Full(experts_call, Experts(tokens=300), TINY_EXPERTS), 140_001, 6 * 2688, OF_EXPERTS),
}


@pytest.mark.parametrize("device, name", on_devices(FULL, (name for name, full in FULL.items() if full.tiny)))
def test_values_and_gradients_at_full_size(device, name):
    full = FULL[name]
    check(full.make(full.at(device)), torch.device(device))


@pytest.mark.parametrize("device, name", on_devices(LONG, (name for name, row in LONG.items() if row.end.tiny)))
def test_the_end_of_a_row_beyond_32_bits(device, name):
    """What comes before is forgotten or of another document, so that the twin needs only the last tokens."""
    row = LONG[name]
    assert row.tokens * row.of_token > INT32
    sizes = row.end.at(device)
    tokens = row.tokens if device == "cuda" else 2 * sizes.tokens
    case = at_the_end(row.end.make(sizes), tokens, row.last or sizes.tokens, row.names, row.axis)
    check(case, torch.device(device))


@pytest.mark.parametrize("fault", ["sees what comes before", "is one token off"])
def test_a_fault_at_the_end_of_a_long_row_is_found(fault):
    """With twins in the place of kernels."""
    case = conv_call(TINY)
    kernel = case.twin

    def wrong(**given: Tensor) -> Any:
        if fault == "sees what comes before":
            return kernel(**given | {"document_ids": torch.zeros_like(given["document_ids"])})
        return kernel(**given | {"x": given["x"].roll(1, 1)})

    names = LONG["convolution"].names
    check(at_the_end(replace(case, run=kernel), 80, TINY.tokens, names, 1), torch.device("cpu"))
    with pytest.raises(KernelMismatch, match="gradient of x"):
        check(at_the_end(replace(case, run=wrong), 80, TINY.tokens, names, 1), torch.device("cpu"))
