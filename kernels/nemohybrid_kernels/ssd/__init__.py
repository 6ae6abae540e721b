"""The state-space scan of Mamba-2."""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.checks import check_divides, check_shape
from nemohybrid_kernels.cpp import obstacle as cpp_obstacle
from nemohybrid_kernels.cpp import reluctance as cpp_reluctance
from nemohybrid_kernels.ssd import mamba_ssm
from nemohybrid_kernels.ssd.reference import ssd_chunked

WIDEST_HEAD, WIDEST_STATE = 128, 256
"""Head dimension and state size that the Triton kernels hold on chip."""


def backends(dtype: torch.dtype, P: int = 64, N: int = 128) -> dict[str, Backend]:
    """Implementations for inputs of `dtype`, head dimension P and state N, the fastest first."""

    def obstacle(device: torch.device) -> str | None:
        return width_obstacle(P, N) or launching.obstacle(device, dtype)

    return {
        "triton": Backend(_triton, obstacle, launching.reluctance),
        "mamba_ssm": Backend(mamba_ssm.run, lambda device: mamba_ssm.obstacle(device, dtype, P, N)),
        "cpp": Backend(_cpp, lambda device: cpp_obstacle(device, dtype), cpp_reluctance),
        "torch": Backend(ssd_chunked),
    }


def width_obstacle(P: int, N: int) -> str | None:
    """Why the Triton kernels cannot scan heads of P with a state of N, or None."""
    if P <= WIDEST_HEAD and N <= WIDEST_STATE:
        return None
    return f"the Triton kernels take heads up to {WIDEST_HEAD} and states up to {WIDEST_STATE}, not {P} and {N}"


def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from nemohybrid_kernels.ssd.triton.op import ssd_scan_triton

    return ssd_scan_triton(*args, **kwargs)


def _cpp(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from nemohybrid_kernels.ssd.cpp import ssd_scan_cpp

    return ssd_scan_cpp(*args, **kwargs)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Structured state-space scan of Mamba-2 (Dao & Gu 2024, "Transformers are SSMs", section 6).

    y_t = C_t S_t + D x_t,  S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  S restarts at 0 where document_ids change.

    x [batch, L, H, P], any L >= 1; dt [batch, L, H], after softplus; A [H], negative; B, C [batch, L, G, N], head h
    uses group h // (H/G); D [H]; document_ids [batch, L], integers that need not be sorted or unique; initial_state
    [batch, H, P, N] continues the first document of each row. x, B and C may be bf16 or fp32; dt, A, D and the decays
    are fp32; a float64 x makes everything float64. chunk_size None picks the best for device and head dimension.

    backend: "triton", "mamba_ssm" (of the package of that name), "cpp" (for CPUs), "torch", or "auto", the first of
    them that can run.

    Returns y like x, and the state after the last token, [batch, H, P, N] in fp32. Differentiable in every floating
    input. Deterministic. Raises BackendError, ShapeError. Twin: `reference.ssd_chunked`; oracle:
    `reference.ssd_sequential`.
    """
    batch, L, H, P = x.shape
    G, N = B.shape[-2:]
    check_divides("heads", H, "groups", G)
    check_shape("dt", dt, B=batch, L=L, H=H)
    check_shape("A", A, H=H)
    check_shape("B", B, B=batch, L=L, G=G, N=N)
    check_shape("C", C, B=batch, L=L, G=G, N=N)
    check_shape("D", D, H=H)
    check_shape("document_ids", document_ids, B=batch, L=L)
    check_shape("initial_state", initial_state, B=batch, H=H, P=P, N=N)
    run = choose("ssd_scan", backend, backends(x.dtype, P, N), x.device)
    return run(x, dt, A, B, C, D, document_ids=document_ids, initial_state=initial_state, chunk_size=chunk_size)
