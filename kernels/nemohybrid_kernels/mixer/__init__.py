"""All of a Mamba-2 mixer between its two projections."""

from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, decide
from nemohybrid_kernels.checks import check_divides, check_shape
from nemohybrid_kernels.cpp import obstacle as cpp_obstacle
from nemohybrid_kernels.cpp import reluctance as cpp_reluctance
from nemohybrid_kernels.errors import ShapeError
from nemohybrid_kernels.mixer.reference import mamba2_mixer_torch
from nemohybrid_kernels.norm import gated_backends
from nemohybrid_kernels.ssd import width_obstacle


def backends(dtype: torch.dtype, P: int = 64, N: int = 128, group_size: int = 1) -> dict[str, Backend]:
    """Implementations for inputs of `dtype`, head dimension P, state N and norms by `group_size`, the fastest first."""

    def obstacle(device: torch.device) -> str | None:
        return width_obstacle(P, N) or gated_backends(dtype, group_size)["triton"].obstacle(device)

    return {
        "triton": Backend(_triton, obstacle, launching.reluctance),
        "cpp": Backend(_cpp, lambda device: cpp_obstacle(device, dtype), cpp_reluctance),
        "torch": Backend(mamba2_mixer_torch),
    }


def _cpp(*args: Any, **kwargs: Any) -> Tensor:
    from nemohybrid_kernels.mixer.cpp import mamba2_mixer_cpp

    return mamba2_mixer_cpp(*args, **kwargs)


def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from nemohybrid_kernels.mixer.triton import mamba2_mixer_triton

    return mamba2_mixer_triton(*args, **kwargs)


def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    norm_weight: Tensor,
    *,
    heads: int,
    groups: int,
    state: int,
    group_size: int,
    eps: float,
    document_ids: Tensor | None = None,
    dt_limit: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """What stands between the projections of a Mamba-2 layer (Dao & Gu 2024, section 7), for whole rows.

    z, x, B, C, dt = split(zxbcdt); x, B, C = silu(conv(x, B, C)); dt = softplus(dt + dt_bias), clamped to dt_limit;
    y = ssd_scan(x, dt, A, B, C, D); gated_rms_norm(y, z).

    zxbcdt [b, L, I + (I + 2 G N) + H], H = heads, I = H P, G = groups, N = state; conv_weight [I + 2 G N, K], conv_bias
    [I + 2 G N]; dt_bias, A (negative), D [H]; norm_weight [I]; group_size and eps as in `gated_rms_norm`; document_ids
    [b, L] as in `ssd_scan`. Returns [b, L, I] in zxbcdt's type.

    backend: "triton" keeps zxbcdt, y, what is convolved and the states between chunks, and writes the gradient of zxbcdt
    once, in place of five gradients to put together. With `recompute` it keeps the first two and makes the others again in
    the backward pass, with the same gradients. "cpp" is the same for CPUs, and keeps all that it made, whatever `recompute`
    says. "torch" is their twin, operator by operator; "auto" takes the first that can run. Differentiable in every floating
    input. Deterministic. Raises BackendError, ShapeError.
    """
    width, shared = zxbcdt.shape[-1] - heads, 2 * groups * state
    inner = (width - shared) // 2
    if inner <= 0 or 2 * inner + shared != width or inner % heads:
        rest = f"{heads} heads, {groups} groups and a state of {state}"
        raise ShapeError(f"zxbcdt has {zxbcdt.shape[-1]} channels, which {rest} cannot share")
    check_divides("heads", heads, "groups", groups)
    check_divides("channels", inner, "group_size", group_size)
    check_shape("conv_weight", conv_weight, C=inner + shared, K=conv_weight.shape[-1])
    check_shape("conv_bias", conv_bias, C=inner + shared)
    for name, tensor in {"dt_bias": dt_bias, "A": A, "D": D}.items():
        check_shape(name, tensor, H=heads)
    check_shape("norm_weight", norm_weight, I=inner)
    check_shape("document_ids", document_ids, B=zxbcdt.shape[0], L=zxbcdt.shape[1])
    possible = backends(zxbcdt.dtype, inner // heads, state, group_size)
    chosen = decide("mamba2_mixer", backend, possible, zxbcdt.device)
    keeping = {"recompute": recompute} if chosen.backend == "triton" else {}
    return chosen.run(
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A,
        D,
        norm_weight,
        heads=heads,
        groups=groups,
        state=state,
        group_size=group_size,
        eps=eps,
        document_ids=document_ids,
        dt_limit=dt_limit,
        chunk_size=chunk_size,
        **keeping,
    )
