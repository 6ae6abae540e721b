"""The feed-forward experts of a mixture: every token visits K of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.checks import check_shape
from nemohybrid_kernels.moe import products
from nemohybrid_kernels.moe.grouped import expert_mlp_grouped
from nemohybrid_kernels.moe.reference import expert_mlp_torch


def expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
    backend: str = "auto",
    absent: bool = False,
    multiply: products.Pair | None = None,
) -> Tensor:
    """Dropless experts: y_t = sum_k down[e] (w activation(up[e] x_t)), e = expert_ids[t, k], w = expert_weights[t, k].

    x [T, D], any T >= 0; expert_ids [T, K] int64 in [0, E); expert_weights [T, K] fp32, which act between activation
    and down projection; up [E, F, D], or [E, 2F, D] where the activation gates and halves; down [E, D, F]; up and down
    are cast to x's type. `activation` maps the last dimension, row by row.

    Returns y like x. Differentiable in x, expert_weights, up and down; an expert without tokens gets zero gradients,
    not None. Deterministic: rows are sorted and gathered, never added by atomics.

    absent: an id may also be E, which means nobody. Such a visit adds zero, and the gradients of its weight and of its
    part of x are zero, whatever x holds. It takes memory like another, but no products.

    backend: "grouped" sorts once, keeps little, and multiplies all experts together, on GPUs by torch's grouped_mm (bf16,
    widths that are multiples of 8, Hopper or later); "triton" is the same with kernels of ours between the products, one
    of which is the activation if that is `nemohybrid_kernels.activation.squared_relu`; "torch" is their twin, a loop in
    plain autograd. Raises BackendError, ShapeError.

    multiply: products of the caller's own with each matrix, with which "triton" and "grouped" compute; "torch" has none.
    """
    (T, D), (E, _, F) = x.shape, down.shape
    check_shape("expert_weights", expert_weights, T=T, K=expert_ids.shape[-1])
    check_shape("expert_ids", expert_ids, T=T, K=expert_ids.shape[-1])
    check_shape("up", up, E=E, F=up.shape[1], D=D)
    check_shape("down", down, E=E, D=D, F=F)

    possible = backends(x.dtype, D, up.shape[1], F, given=multiply is not None)
    how: dict[str, Any] = {"activation": activation, "absent": absent}
    if multiply is not None:
        how["products"] = multiply
    run = choose("expert_mlp", backend, possible, x.device)
    return run(x, expert_ids, expert_weights, up, down, **how)


def backends(dtype: torch.dtype, *widths: int, given: bool = False) -> dict[str, Backend]:
    """Implementations for rows of `dtype` and matrices of these `widths`, the fastest first. given: products are, which the
    last, plain autograd, has no place for."""

    def obstacle(device: torch.device) -> str | None:
        return products.obstacle(dtype, widths, device) if device.type == "cuda" and not given else None

    found = {
        "triton": Backend(_triton, lambda device: launching.obstacle(device, dtype), launching.reluctance),
        "grouped": Backend(expert_mlp_grouped, obstacle),
    }
    return found if given else found | {"torch": Backend(expert_mlp_torch)}


def _triton(*args: Any, **kwargs: Any) -> Tensor:
    from nemohybrid_kernels.moe.triton import expert_mlp_triton

    return expert_mlp_triton(*args, **kwargs)
