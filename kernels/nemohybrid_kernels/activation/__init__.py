"""Activations of feed-forward layers."""

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.cpp import obstacle as cpp_obstacle
from nemohybrid_kernels.cpp import reluctance as cpp_reluctance


def squared_relu(h: Tensor, backend: str = "auto") -> Tensor:
    """relu(h)^2 (So et al. 2021, Primer), of any shape. backend "cpp", "torch", or "auto". Raises BackendError."""
    return choose("squared_relu", backend, backends(h.dtype), h.device)(h)


def backends(dtype: torch.dtype) -> dict[str, Backend]:
    """Implementations for inputs of `dtype`, the fastest first."""
    return {
        "cpp": Backend(_cpp, lambda device: cpp_obstacle(device, dtype), cpp_reluctance),
        "torch": Backend(squared_relu_torch),
    }


def squared_relu_torch(h: Tensor) -> Tensor:
    """The formula."""
    return F.relu(h).square()


def _cpp(h: Tensor) -> Tensor:
    return import_module("nemohybrid_kernels.activation.cpp").squared_relu_cpp(h)
