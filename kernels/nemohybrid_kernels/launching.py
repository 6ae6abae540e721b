"""Starting Triton kernels: with a fixed configuration from a table, or, in place of a GPU, into a list.

A configuration is the tile sizes, warps and stages of one kernel on one architecture. The `configs.json` of an operator has
one to three for each, and scripts/bench/tune_kernels.py writes it; nothing is tuned when a job starts, so every start runs
the same code.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)
"""Those with a column in the table. Others take the column of sm_80, whose tiles fit into 99 KB of shared memory."""

TRITON = find_spec("triton") is not None
"""Whether it is installed: a look through the folders of Python, at every call it would be 40 microseconds."""

Fact = int | str
"""What a choice may depend on: a size of the call, or its type ("bf16", "fp32")."""


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled: `tiles` are its constexpr arguments, by name."""

    tiles: Mapping[str, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """A start that was recorded. `arguments` are all but the tiles, by name; tensors may be on the meta device.

    `entry` is the place of its configuration among those that the table has for the kernel; None if it came from elsewhere.
    """

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    arguments: dict[str, Any]
    entry: int | None = None

    @property
    def tensor_bytes(self) -> int:
        """Counted, not measured: what moves if every tensor is read or written once, and all of it."""
        return sum(
            value.numel() * value.element_size() for value in self.arguments.values() if isinstance(value, Tensor)
        )


class Recording(list[Launch]):
    """Launches in their order. `entries` are the configurations that were looked up: kernel and place, the last one last."""

    def __init__(self, architecture: int, runs: bool) -> None:
        super().__init__()
        self.architecture, self.runs = architecture, runs
        self.entries: dict[str, list[int]] = {}

    def add(self, kernel: Any, grid: tuple[int, ...], config: Config, arguments: dict[str, Any]) -> None:
        entry = self.entries.get(kernel.__name__, [None])[-1]
        self.append(Launch(kernel, grid, config, arguments, entry))


_recorder: ContextVar[Recording | None] = ContextVar("recorder", default=None)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Run `kernel` over `grid`, unless launches are only recorded."""
    if (recorder := _recorder.get()) is not None:
        recorder.add(kernel, grid, config, arguments)
    if 0 in grid or (recorder is not None and not recorder.runs):
        return
    with _on_device_of(arguments):
        kernel[grid](**arguments, **config.tiles, **compiler_options(config))


def compiler_options(config: Config) -> dict[str, Any]:
    """a * b + c in one rounding is said, since versions of Triton differ in what they do when told nothing."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def _on_device_of(arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def recording(architecture: int, *, runs: bool = False) -> Iterator[Recording]:
    """Within the block what would run on sm_`architecture` is listed; tensors may be on the meta device, unless it `runs`."""
    token = _recorder.set(found := Recording(architecture, runs))
    try:
        yield found
    finally:
        _recorder.reset(token)


_cut: tuple[int, int] | None = None


@contextmanager
def cut_like(rows: int, tokens: int) -> Iterator[None]:
    """Within the block kernels cut calls into programs as one of `rows` rows of `tokens` tokens: small ones run the
    kernels of a large one, compiled with the same constants. In all threads, since backward passes have their own."""
    global _cut
    before, _cut = _cut, (rows, tokens)
    try:
        yield
    finally:
        _cut = before


def size_to_cut(rows: int, tokens: int) -> tuple[int, int]:
    """Rows and their tokens that say how a call of this size is cut: its own, but within `cut_like`."""
    return _cut or (rows, tokens)


def config_for(kernel: str, device: torch.device, **facts: Fact) -> Config:
    """The configuration of `kernel` for a call with these facts: the first in the table whose conditions they meet."""
    for place, entry in enumerate(table()[f"sm_{architecture(device)}"][kernel]):
        if all(_meets(facts[name], wanted) for name, wanted in entry.get("when", {}).items()):
            if (recorder := _recorder.get()) is not None:
                recorder.entries.setdefault(kernel, []).append(place)
            return Config(entry["tiles"], entry["warps"], entry["stages"])
    raise LookupError(f"configs.json has no configuration of {kernel} for {facts}")


def _meets(fact: Fact, wanted: Fact | list[int]) -> bool:
    """`wanted` is a value, or [lowest, highest]."""
    return wanted[0] <= int(fact) <= wanted[1] if isinstance(wanted, list) else fact == wanted


@cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All configs.json together: architecture -> kernel -> configurations, tried in order."""
    merged: dict[str, dict[str, list[dict[str, Any]]]] = {f"sm_{number}": {} for number in ARCHITECTURES}
    for file in sorted(Path(__file__).parent.glob("*/configs.json")):
        for name, kernels in json.loads(file.read_text(encoding="utf-8")).items():
            merged[name] |= kernels
    return merged


def architecture(device: torch.device) -> int:
    """The column of the table for a device. Without a GPU, that of Hopper."""
    if (recorder := _recorder.get()) is not None:
        return recorder.architecture
    if device.type != "cuda":
        return 90
    major = torch.cuda.get_device_capability(device)[0]
    return major * 10 if major * 10 in ARCHITECTURES else 80


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, in Python on the CPU: slow, and for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why Triton kernels cannot compute in `dtype` on `device`, or None. Eager calls ask each time."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"the Triton kernels take bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and interpreted()):
        return "it needs a CUDA device, or TRITON_INTERPRET=1 for tests on the CPU"
    if not TRITON:
        return "Triton is not installed; pip install 'nemohybrid[gpu]'"
    return _too_old(device) if device.type == "cuda" else None


def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def dtype_fact(tensor: Tensor) -> str:
    """The type of a call, as the table calls it."""
    return "fp32" if tensor.dtype == torch.float32 else "bf16"


def reluctance(device: torch.device) -> str | None:
    """Why kernels run on `device` only when asked for, though they could: not even then is the interpreter a choice."""
    return None if device.type == "cuda" else "the interpreter is for tests"
