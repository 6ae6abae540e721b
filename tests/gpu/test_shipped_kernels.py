"""Every kernel in every configuration that is shipped, on the GPU that is here, against its twin in float64.

Widths are those for which it is shipped, so the table gives the same configuration; rows are short, since the table does
not look at them. On a CPU the same code runs at tiny widths, in the interpreter.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from operator_calls import (
    Rows,
    conv_call,
    experts_call,
    loss_call,
    mixer_call,
    norm_call,
    on_devices,
    scan_call,
    squared_relu_call,
)

from nemohybrid_kernels import calls
from nemohybrid_kernels.calls import CASES, FP32, Experts, Mixer
from nemohybrid_kernels.canary import Case, check
from nemohybrid_kernels.launching import Recording, architecture, recording

TOKENS = 301
TINY_MIXER = {"tokens": 37, "heads": 2, "width": 16, "groups": 1, "dtype": FP32}


def of_mixers(make: Callable[[Mixer], Case], sizes: Mixer, tiny: bool) -> Case:
    small = {**TINY_MIXER, "state": sizes.state // 8} if tiny else {"tokens": TOKENS}
    return make(replace(sizes, **small))


def norm(width: int, dtype: torch.dtype, tokens: int, tiny: bool) -> Case:
    return norm_call(Rows(9, width // 64, FP32) if tiny else Rows(TOKENS, width, dtype))


def experts(sizes: Experts, tiny: bool) -> Case:
    small = {"tokens": 9, "hidden": 16, "width": 16, "dtype": FP32} if tiny else {"tokens": TOKENS}
    return experts_call(replace(sizes, **small))


def activation(width: int, dtype: torch.dtype, tiny: bool) -> Case:
    return squared_relu_call(Rows(9, width // 256, FP32) if tiny else Rows(TOKENS, width, dtype))


def loss(tokens: int, columns: int, dtype: torch.dtype, tiny: bool) -> Case:
    return loss_call(Rows(9, columns // 2048, FP32) if tiny else Rows(TOKENS, columns, dtype))


AS_CALLED: dict[Callable[..., Any], Callable[..., Case]] = {
    calls.run_mixer: partial(of_mixers, mixer_call),
    calls.run_conv: partial(of_mixers, conv_call),
    calls.run_scan: partial(of_mixers, scan_call),
    calls.run_norm: norm,
    calls.run_experts: experts,
    calls.run_squared_relu: activation,
    calls.run_loss: loss,
}
"""What runs the launchers of a shipped case -> the call of the operator that leads to the same kernels."""


def configurations(launches: Recording) -> set[tuple[str, int | None]]:
    """Kernel, and place in the table."""
    return {(launch.kernel.__name__, launch.entry) for launch in launches}


BY_NAME = {case.name: case for case in CASES}
ONE_OF_EACH = {case.run.func: case.name for case in reversed(CASES)}  # type: ignore[attr-defined]
"""What runs the launchers -> the first case that they run."""


@pytest.mark.parametrize("device, name", on_devices(BY_NAME, ONE_OF_EACH.values()))
def test_every_shipped_kernel_equals_its_twin(device, name):
    run: Any = BY_NAME[name].run
    case, where = AS_CALLED[run.func](*run.args, tiny=device == "cpu"), torch.device(device)
    column = architecture(where)
    # In a thread of autograd's own a backward pass would not be recorded.
    with recording(column, runs=True) as launched, torch.autograd.set_multithreading_enabled(False):
        check(case, where)
    missed = configurations(BY_NAME[name].launches(column)) - configurations(launched)
    if device == "cpu":  # tiny widths may have configurations of their own
        missed = {kernel for kernel, _ in missed} - {kernel for kernel, _ in configurations(launched)}
    assert not missed, f"{name}: the call of the operator does not reach {sorted(missed, key=str)}"
