"""The loss of a language model, token by token: of its logits, or of what the output projection makes them from."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels import launching
from nemohybrid_kernels.backend import Backend, choose, decide
from nemohybrid_kernels.checks import check_shape
from nemohybrid_kernels.cross_entropy import linear
from nemohybrid_kernels.cross_entropy.columns import Reduce, cross_entropy_of_columns
from nemohybrid_kernels.cross_entropy.linear import Holder
from nemohybrid_kernels.cross_entropy.reference import cross_entropy

__all__ = ["backends", "cross_entropy", "cross_entropy_of_columns", "linear_cross_entropy", "rows_at_once"]

Product = Callable[[Tensor, Tensor, None], Tensor]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    columns: int | None = None,
    first: int = 0,
    largest: Reduce | None = None,
    total: Reduce | None = None,
    product: Product | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """-log softmax(x weight^T)[label] of every token.

    x [T, D]; weight [W, D], cast to x's type; labels [T] int64. Logits have x's type, all else is computed in fp32. Returns
    [T] in fp32 (float64 for float64), differentiable in x and weight. Deterministic.

    columns: rows of the weight from here on are padding, with no logit and no gradient. Default: none are.
    first, largest, total: where several holders have some of the columns each, as in `cross_entropy_of_columns`; labels are
    the same for all, and the gradient of x is this holder's summand. Two exchanges, whatever the number of tokens.

    backend: "triton" and "torch" take `chunk_tokens` at a time (default: what a GiB of logits holds, at most 8192) and never
    have the logits of more; the backward pass multiplies them anew. "plain" keeps all logits, which `product(x, weight, None)`
    makes, where given. Raises BackendError, ShapeError.
    """
    check_shape("x", x, T=labels.shape[0], D=weight.shape[1])
    run = choose("linear_cross_entropy", backend, backends(x.dtype), x.device)
    holder = Holder(weight.shape[0] if columns is None else columns, first, largest, total)
    return run(x, weight, labels, holder, product=product, chunk_tokens=chunk_tokens)


def rows_at_once(weight: Tensor, tokens: int, dtype: torch.dtype, backend: str = "auto") -> int:
    """Of how many of `tokens` `linear_cross_entropy` holds the logits at a time. Raises BackendError."""
    chosen = decide("linear_cross_entropy", backend, backends(dtype), weight.device).backend
    return tokens if chosen == "plain" else min(tokens, linear.chunk_size(tokens, len(weight), dtype.itemsize))


def backends(dtype: torch.dtype) -> dict[str, Backend]:
    """Implementations of `linear_cross_entropy` for x of `dtype`, the fastest first."""
    return {
        "triton": Backend(_triton, lambda device: launching.obstacle(device, dtype), launching.reluctance),
        "torch": Backend(_torch, reluctance=_slower),
        "plain": Backend(_plain),
    }


def _slower(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "without a GPU memory is worth less than the product that it repeats"


def _triton(
    x: Tensor, weight: Tensor, labels: Tensor, holder: Holder, *, product: Product | None, chunk_tokens: int | None
) -> Tensor:
    from nemohybrid_kernels.cross_entropy.triton import TRITON

    return linear.chunked_cross_entropy(x, weight, labels, holder, chunk_tokens, TRITON)


def _torch(
    x: Tensor, weight: Tensor, labels: Tensor, holder: Holder, *, product: Product | None, chunk_tokens: int | None
) -> Tensor:
    return linear.chunked_cross_entropy(x, weight, labels, holder, chunk_tokens, linear.TORCH)


def _plain(
    x: Tensor, weight: Tensor, labels: Tensor, holder: Holder, *, product: Product | None, chunk_tokens: int | None
) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype)) if product is None else product(x, weight, None)
    logits = logits[:, : holder.columns]
    if holder.largest is None or holder.total is None:
        return cross_entropy(logits, labels)
    return cross_entropy_of_columns(logits, labels, holder.first, holder.largest, holder.total)
