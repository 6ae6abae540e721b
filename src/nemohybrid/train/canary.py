"""Before the first step on a machine: the fused kernels of a run, each held to its twin once; a wrong one ends the run."""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from nemohybrid.checkpoint.world import World
from nemohybrid.config.ranks import data_ranks, microbatch
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.model.hybrid import DTYPES
from nemohybrid.train.canary_cases import Calls, cases_of
from nemohybrid_kernels.canary import Case, KernelMismatch, check
from nemohybrid_kernels.machine import machine

KEYS = {
    "mamba2_mixer": ("mixer_backend", "separate"),
    "ssd_scan": ("ssd_backend", "torch"),
    "causal_conv1d": ("conv1d_backend", "torch"),
    "rms_norm": ("norm_backend", "torch"),
    "gated_rms_norm": ("norm_backend", "torch"),
    "squared_relu": ("activation_backend", "torch"),
    "attention": ("attention_backend", "torch"),
    "ring_attention": ("attention_backend", "torch"),
    "expert_mlp": ("moe_backend", "torch"),
    "cross_entropy": ("cross_entropy_backend", "torch"),
}
"""Operator -> the key that chooses its backend, and the choice that avoids its kernels."""


def check_kernels(model: nn.Module, config: RunConfig, device: torch.device) -> list[str]:
    """What the user must know of the fused kernels in `model`, whose backends are bound; nothing where there are none.

    Every rank checks on its own device what this device has not passed before, and all wait for each other. Raises
    TrainingError on every rank where a kernel was wrong on one.
    """
    dtype, packed = DTYPES[config.model.dtype], config.data.reset_documents
    row, rows = config.data.sequence_length, microbatch(config, data_ranks(config, World().size))
    cases = cases_of(model, Calls.of(dtype, device, packed, config.model.chunk_size, row, rows))
    if config.kernels.canary == "skip":
        return _skipped(cases)
    passed = Passed(machine(device))
    return World().together(lambda: _check(passed, cases, device, config.kernels.canary == "always"))


def _skipped(cases: Sequence[Case]) -> list[str]:
    if not cases:
        return []
    names = ", ".join(dict.fromkeys(f"{case.operator} {case.backend}" for case in cases))
    return [
        f"warning: kernels.canary=skip: nobody knows whether {names} compute here what they should. A kernel that is wrong "
        "in silence costs the run"
    ]


def _check(passed: "Passed", cases: Sequence[Case], device: torch.device, all_of_them: bool) -> list[str]:
    due = [case for case in cases if all_of_them or case.name not in passed.names()]
    if not due:
        return []
    started = time.perf_counter()
    for case in due:
        try:
            check(case, device)
        except KernelMismatch as error:
            raise _failure(case, error, passed.machine) from error
    note = passed.add(case.name for case in due)
    what = ", ".join(dict.fromkeys(f"{case.operator} {case.backend}" for case in due))
    return [f"kernels agree with their twins: {what} ({time.perf_counter() - started:.1f} s)", *note]


def _failure(case: Case, error: KernelMismatch, where: dict[str, str]) -> TrainingError:
    """Said here too: where a kernel has broken the device, this rank cannot tell the others any more."""
    key, instead = KEYS[case.operator]
    here = ", ".join(f"{name} {value}" for name, value in where.items())
    told = (
        f"a kernel computes something else than its twin, so nothing was trained. {error}.\n"
        f"kernels.{key}={instead} trains without it. Please report this, with the machine: {here}"
    )
    if World().distributed:
        print(told, file=sys.stderr, flush=True)
    return TrainingError(told)


class Passed:
    """What a machine has passed: a JSON file for each machine, so that ranks never write into each other's.

    A file that is missing, damaged or of another machine means that nothing was passed, one that cannot be written that it
    is passed again next time.
    """

    def __init__(self, of_machine: dict[str, str]) -> None:
        self.machine = of_machine
        digest = hashlib.sha256(json.dumps(of_machine, sort_keys=True).encode()).hexdigest()
        self.file = cache_folder() / f"{digest[:32]}.json"

    def names(self) -> list[str]:
        """Of cases."""
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
            return list(map(str, known["passed"])) if known["machine"] == self.machine else []
        except (OSError, ValueError, LookupError, TypeError):
            return []

    def add(self, names: Iterable[str]) -> list[str]:
        """Remember; returns why it is not remembered, if so. Whoever reads sees the old file or the new one."""
        text = json.dumps({"machine": self.machine, "passed": sorted({*self.names(), *names})}, indent=1)
        new = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(text + "\n", encoding="utf-8")
            new.replace(self.file)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            return [f"warning: they will be compared again next time, since {self.file} cannot be written: {error}"]
        return []


def cache_folder() -> Path:
    """`nemohybrid/canary` in the user's cache: $XDG_CACHE_HOME, or ~/.cache; for a user without a home among temporary files."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # one that is relative counts as not set (XDG base directories)
    if not base.is_absolute():
        try:
            base = Path("~/.cache").expanduser()
        except RuntimeError:
            base = Path(tempfile.gettempdir())
    return base / "nemohybrid" / "canary"
