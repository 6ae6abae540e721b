"""Activations of feed-forward layers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.cpp import obstacle as cpp_obstacle
from nemohybrid_kernels.cpp import reluctance as cpp_reluctance


def squared_relu(h: Tensor, backend: str = "auto") -> Tensor:
    """relu(h)^2 (So et al. 2021, Primer), h [..., F].

    backend "triton" and "cpp" make one pass through memory each way, and keep h; "torch" is their twin; "auto" takes the
    first that can run. Differentiable. Deterministic. Raises BackendError. Twin: `squared_relu_torch`.
    """
    return choose("squared_relu", backend, backends(h.dtype), h.device)(h)


def backends(dtype: torch.dtype) -> dict[str, Backend]:
    """Implementations for inputs of `dtype`, the fastest first."""
    return {
        "triton": Backend(_triton, lambda device: launching.obstacle(device, dtype), launching.reluctance),
        "cpp": Backend(_cpp, lambda device: cpp_obstacle(device, dtype), cpp_reluctance),
        "torch": Backend(squared_relu_torch),
    }


def is_squared_relu(activation: Callable[..., Tensor]) -> bool:
    """Whether it is `squared_relu`, also with a backend of its own: partial(squared_relu, backend=...)."""
    return (activation.func if isinstance(activation, partial) else activation) is squared_relu


def squared_relu_torch(h: Tensor) -> Tensor:
    """The formula."""
    return F.relu(h).square()


def swiglu(h: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis (Shazeer 2020)."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _triton(h: Tensor) -> Tensor:
    from nemohybrid_kernels.activation.triton import squared_relu_triton

    return squared_relu_triton(h)


def _cpp(h: Tensor) -> Tensor:
    from nemohybrid_kernels.activation.cpp import squared_relu_cpp

    return squared_relu_cpp(h)
