"""The short causal convolution in front of the scan of Mamba-2."""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.checks import check_shape
from nemohybrid_kernels.conv1d import package
from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch
from nemohybrid_kernels.cpp import obstacle as cpp_obstacle
from nemohybrid_kernels.cpp import reluctance as cpp_reluctance


def backends(dtype: torch.dtype, taps: int = 4) -> dict[str, Backend]:
    """Implementations for inputs of `dtype` and filters of so many taps, the fastest first."""
    return {
        "triton": Backend(_triton, lambda device: launching.obstacle(device, dtype), launching.reluctance),
        "causal_conv1d": Backend(package.run, lambda device: package.obstacle(device, dtype, taps)),
        "cpp": Backend(_cpp, lambda device: cpp_obstacle(device, dtype), cpp_reluctance),
        "torch": Backend(causal_conv1d_torch),
    }


def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from nemohybrid_kernels.conv1d.triton import causal_conv1d_triton

    return causal_conv1d_triton(*args, **kwargs)


def _cpp(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from nemohybrid_kernels.conv1d.cpp import causal_conv1d_cpp

    return causal_conv1d_cpp(*args, **kwargs)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over the length, then the activation (Gu & Dao 2023, section 3.4).

    y_t = act(bias + sum_k weight[:, k] x_{t-(K-1)+k}), where inputs before the row or of another document count as 0.

    x [B, L, C], channels last, any L >= 1; weight [C, K], any K >= 1; bias [C]; activation "silu" or None; document_ids
    [B, L], a document starts wherever the id differs from the one before; initial_state [B, K-1, C], the inputs before
    the row, which belong to its first document. backend "triton", "causal_conv1d" (of the package of that name), "torch",
    or "auto", the first of them that can run.

    Returns y like x, and the inputs that a next call needs as its initial_state to go on with the last document,
    [B, K-1, C]: zeros stand for what lies outside it. Differentiable in every floating input. Deterministic.
    Raises BackendError, ShapeError, and ValueError for another activation.
    """
    B, L, C = x.shape
    K = weight.shape[-1]
    check_shape("weight", weight, C=C, K=K)
    check_shape("bias", bias, C=C)
    check_shape("document_ids", document_ids, B=B, L=L)
    check_shape("initial_state", initial_state, B=B, taps=K - 1, C=C)
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d has no activation {activation!r}. Legal: 'silu', None")
    run = choose("causal_conv1d", backend, backends(x.dtype, K), x.device)
    return run(x, weight, bias, activation=activation, document_ids=document_ids, initial_state=initial_state)
