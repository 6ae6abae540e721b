"""The Triton kernels of mamba-ssm, imported without the rest of that package.

`import mamba_ssm` also wants compiled modules, TileLang and transformers. Its files in ops/triton need torch, triton and einops,
and here only they are imported, from wherever the package lies: installed, or unpacked in the folder NEMOHYBRID_MAMBA_SSM.
Afterwards `mamba_ssm.ops.triton...` is importable by everybody in this process, our own adapter included.
"""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peer_compile import compile_together
from torch import Tensor

from nemohybrid_kernels import packages
from nemohybrid_kernels.conv1d import triton as our_conv
from nemohybrid_kernels.documents import document_starts

FOLDER = "NEMOHYBRID_MAMBA_SSM"
"""Environment variable: the folder that holds `mamba_ssm/`, such as an unpacked sdist."""


class PeerMissing(Exception):
    """Why there is nothing to compare with."""


@dataclass(frozen=True)
class Peer:
    """What is compared. `conv` says whose convolution stands in `split`, which cannot run without one."""

    version: str
    conv: str
    cumsum: Callable[..., tuple[Tensor, Tensor]]  # _chunk_cumsum_fwd
    scan: Callable[..., Tensor]  # mamba_chunk_scan_combined
    norm: Callable[..., Tensor]  # rmsnorm_fn
    split: Callable[..., Tensor]  # mamba_split_conv1d_scan_combined


def load() -> Peer:
    """Raises PeerMissing with the reason."""
    folder = _folder()
    for package in ("triton", "einops", "packaging"):
        if find_spec(package) is None:
            raise PeerMissing(f"mamba-ssm is here, but not {package}, which its kernels need")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _make_interpretable()
    else:
        compile_together()
    _bare_package(folder / "mamba_ssm")
    try:
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        norm = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    except Exception as error:
        raise PeerMissing(f"mamba-ssm in {folder} cannot be imported: {type(error).__name__}: {error}") from error
    packages.forget()
    conv = _give_convolution(combined)
    return Peer(
        _version(folder),
        conv,
        combined._chunk_cumsum_fwd,
        combined.mamba_chunk_scan_combined,
        norm.rmsnorm_fn,
        combined.mamba_split_conv1d_scan_combined,
    )


def _folder() -> Path:
    if given := os.environ.get(FOLDER):
        if not (Path(given) / "mamba_ssm").is_dir():
            raise PeerMissing(f"{FOLDER}={given} holds no folder mamba_ssm")
        return Path(given)
    if "mamba_ssm" in sys.modules:
        return Path(next(iter(sys.modules["mamba_ssm"].__path__))).parent
    spec = find_spec("mamba_ssm")
    if spec is None or not spec.submodule_search_locations:
        raise PeerMissing(f"mamba-ssm is not installed, and {FOLDER} names no folder of it")
    return Path(next(iter(spec.submodule_search_locations))).parent


def _bare_package(folder: Path) -> None:
    """`mamba_ssm` as a package whose __init__.py was never run."""
    if "mamba_ssm" in sys.modules:
        return
    module = ModuleType("mamba_ssm")
    module.__path__ = [str(folder)]
    module.__spec__ = ModuleSpec("mamba_ssm", loader=None, is_package=True)
    sys.modules["mamba_ssm"] = module


def _version(folder: Path) -> str:
    """Of the installed package, or of the folder by its own word."""
    if os.environ.get(FOLDER) is None:
        try:
            return version("mamba-ssm")
        except PackageNotFoundError:
            pass
    words = (folder / "mamba_ssm/__init__.py").read_text(encoding="utf-8").splitlines()
    found = next((line for line in words if line.startswith("__version__")), "")
    return found.partition("=")[2].strip().strip("\"'") or "unknown"


def _make_interpretable() -> None:
    """In Triton's interpreter on a CPU: no device to select or to ask for its size, and nothing to tune."""
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    if torch.cuda.is_available():
        return
    torch.cuda.device = lambda *_: nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]


# --- a convolution for its whole mixer -------------------------------------------------------------------------------


def _give_convolution(combined: Any) -> str:
    """causal-conv1d where it is installed, as in its own tests; otherwise ours, at the addresses where it looks."""
    if combined.causal_conv1d_fwd_function is not None:
        if combined.causal_conv1d_fwd_function is not _conv_forward:
            return f"causal-conv1d {version('causal-conv1d')}"
    else:
        combined.causal_conv1d_fwd_function, combined.causal_conv1d_bwd_function = _conv_forward, _conv_backward
    return "ours"


def _conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor | None, initial: None, final: None, silu: bool
) -> Tensor:
    """x [b, C, L], channels last, as causal-conv1d takes it."""
    y = our_conv.forward(x.transpose(1, 2), weight, bias, _starts(ids), None, silu)
    return y.transpose(1, 2)


def _conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    ids: Tensor | None,
    initial: None,
    d_final: None,
    dx: Tensor,
    wants_initial: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    rows = dx.transpose(1, 2)
    got = our_conv.backward(dy.transpose(1, 2), x.transpose(1, 2), weight, bias, _starts(ids), None, silu, rows)
    return got.x.transpose(1, 2), got.weight.to(weight.dtype), got.bias.to(bias.dtype), None


_last: tuple[Tensor, Tensor] | None = None


def _starts(ids: Tensor | None) -> Tensor | None:
    """Found once for the ids of a benchmark: they are an input of theirs, and no work that their kernels would do."""
    global _last
    if ids is None:
        return None
    if _last is None or _last[0] is not ids:
        _last = ids, document_starts(ids)
    return _last[1]
