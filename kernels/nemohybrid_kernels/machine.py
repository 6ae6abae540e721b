"""All that decides which code a kernel becomes and what runs it, in words: a new machine is one where any of it differs."""

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nemohybrid_kernels import launching

PACKAGES = ("triton", "mamba-ssm", "causal-conv1d", "flash-attn", "flash-attn-3", "flash-attn-4")
SOURCES = (".py", ".json", ".cpp", ".h")


def machine(device: torch.device) -> dict[str, str]:
    """The device itself, its driver, the versions of torch and of all packages with kernels, and our own sources."""
    return {
        **(_gpu(device) if device.type == "cuda" else {"device": platform.processor() or platform.machine()}),
        "torch": torch.__version__,
        **dict(_packages()),
        "kernels": sources()[:16],
        **({"triton runs in": "its interpreter"} if launching.interpreted() else {}),
    }


def _gpu(device: torch.device) -> dict[str, str]:
    """With its number: of two GPUs of one make one may be broken."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": f"{facts.name} ({facts.major}.{facts.minor})",
        "uuid": str(getattr(facts, "uuid", "")),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def _driver() -> str:
    """Of the kernel module, or where that is hidden the newest CUDA that it can do."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("\n", 1)[0]
        return next(word for word in line.split() if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        newest = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")
        return f"for CUDA {newest()}"


def _packages() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


@cache
def sources() -> str:
    """SHA-256 of all source and configuration files of this package."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
