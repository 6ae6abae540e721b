"""Root-mean-square norms: the plain one before every layer, and the gated one of Mamba-2."""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.checks import check_divides, check_shape
from nemohybrid_kernels.cpp import obstacle as cpp_obstacle
from nemohybrid_kernels.cpp import reluctance as cpp_reluctance
from nemohybrid_kernels.norm import reference

__all__ = ["backends", "gated_backends", "gated_rms_norm", "rms_norm"]

WIDEST, WIDEST_GATED = 16384, 8192
"""Channels that the Triton kernels can hold in registers, without and with a gate."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    x [..., D], weight [D]. backend "triton", "cpp", "torch", or "auto", the first of them that can run. Returns x's shape and
    type; all between is fp32, or float64 for float64. Deterministic. Raises BackendError, ShapeError.
    """
    D = x.shape[-1]
    check_shape("weight", weight, D=D)
    return choose("rms_norm", backend, backends(x.dtype, D), x.device)(x, weight, eps)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float, backend: str = "auto"
) -> Tensor:
    """RMS norm of x * silu(z), each group of `group_size` neighbouring channels by itself, times weight.

    The gate comes before the norm and the norm is by group, as in the Mamba-2 layers of Megatron-LM: a tensor-parallel
    rank that holds whole groups needs no other's. x, z [..., D], weight [D]. Backends, result and errors as of
    `rms_norm`.
    """
    D = x.shape[-1]
    check_shape("weight", weight, D=D)
    check_divides("channels", D, "group_size", group_size)
    run = choose("gated_rms_norm", backend, gated_backends(x.dtype, group_size), x.device)
    return run(x, z, weight, group_size=group_size, eps=eps)


def backends(dtype: torch.dtype, width: int = 1) -> dict[str, Backend]:
    """Implementations of `rms_norm` for inputs of `dtype` and `width` channels, the fastest first."""
    triton = _triton("rms_norm_triton", dtype, width, WIDEST)
    return {"triton": triton, "cpp": _cpp("rms_norm_cpp", dtype), "torch": Backend(reference.rms_norm)}


def gated_backends(dtype: torch.dtype, group_size: int = 1) -> dict[str, Backend]:
    """Implementations of `gated_rms_norm`, likewise."""
    triton = _triton("gated_rms_norm_triton", dtype, group_size, WIDEST_GATED)
    return {"triton": triton, "cpp": _cpp("gated_rms_norm_cpp", dtype), "torch": Backend(reference.gated_rms_norm)}


def _triton(name: str, dtype: torch.dtype, width: int, widest: int) -> Backend:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        from nemohybrid_kernels.norm import triton

        return getattr(triton, name)(*args, **kwargs)

    def obstacle(device: torch.device) -> str | None:
        if width > widest:
            return f"the Triton kernels norm up to {widest} channels together, not {width}"
        return launching.obstacle(device, dtype)

    return Backend(run, obstacle, launching.reluctance)


def _cpp(name: str, dtype: torch.dtype) -> Backend:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        from nemohybrid_kernels.norm import cpp

        return getattr(cpp, name)(*args, **kwargs)

    return Backend(run, lambda device: cpp_obstacle(device, dtype), cpp_reluctance)
