"""Packages of others that a backend needs: imported when first used, and their absence put in words."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from nemohybrid_kernels.errors import BackendError


def load(module: str, advice: str) -> ModuleType:
    """The module. Raises BackendError with `advice`, which says how to install it."""
    if (found := missing(module, advice)) is not None:
        raise BackendError(found)
    return import_module(module)


@cache
def missing(module: str, advice: str) -> str | None:
    """Why `module` cannot be imported, or None. It is imported: a package built for another torch shows only then."""
    package = module.partition(".")[0]
    if not installed(package):
        return f"{package} is not installed; {advice}"
    try:
        import_module(module)
    except Exception as error:  # undefined symbols, a missing driver: whatever a compiled package may raise
        return f"{module} cannot be imported ({type(error).__name__}: {_first_line(error)}); {advice}"
    return None


@cache
def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    return find_spec(package) is not None


def cuda_obstacle(module: str, advice: str, device: torch.device) -> str | None:
    """Why `module`, which computes on CUDA devices only, cannot be used on `device`. Imports it only there."""
    package = module.partition(".")[0]
    if device.type != "cuda":
        found = torch.compiler.is_compiling() or installed(package)  # torch.compile warns of what is remembered
        return "it needs a CUDA device" if found else f"it needs a CUDA device and {package}; {advice}"
    return missing(module, advice)


def first(result: Any) -> Any:
    """What a function returned that in some of its versions returns a tuple of it and more."""
    return result[0] if isinstance(result, tuple) else result


def forget() -> None:
    """What was found may have changed: tests put fakes where packages would be."""
    missing.cache_clear()
    installed.cache_clear()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
