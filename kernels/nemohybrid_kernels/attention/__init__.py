"""Causal attention with grouped keys, over packed documents, with or without a cap on the scores."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemohybrid_kernels.attention import cpp, flash, flex, parts, sdpa
from nemohybrid_kernels.attention.case import Case
from nemohybrid_kernels.attention.packing import Documents
from nemohybrid_kernels.attention.reference import attention_torch
from nemohybrid_kernels.backend import Backend, choose
from nemohybrid_kernels.checks import check_divides, check_shape

__all__ = ["Case", "Documents", "attention", "backends", "parts"]


def backends(case: Case) -> dict[str, Backend]:
    """Implementations, the preferred first.

    Without documents that is PyTorch's own choice of fused kernels. They know documents only as a mask of all pairs, which
    is read and computed in full, so on GPUs what skips other documents is preferred: flash-attn where it is installed, or
    else FlexAttention. On CPUs the C++ kernels are, where they are built.
    """
    made = {
        "sdpa": Backend(sdpa.run, partial(sdpa.obstacle, case), partial(_sdpa_reluctance, case)),
        "flash3": Backend(partial(flash.run, flash.FLASH3), partial(flash.obstacle, flash.FLASH3, case)),
        "flash4": Backend(partial(flash.run, flash.FLASH4), partial(flash.obstacle, flash.FLASH4, case)),
        "flash2": Backend(partial(flash.run, flash.FLASH2), partial(flash.obstacle, flash.FLASH2, case)),
        "flex": Backend(flex.run, partial(flex.obstacle, case)),
        "cudnn": Backend(sdpa.run_cudnn, partial(sdpa.cudnn_obstacle, case), _cudnn_reluctance),
        "cpp": Backend(cpp.run, partial(cpp.obstacle, case), partial(cpp.reluctance, case)),
        "torch": Backend(attention_torch),
    }
    return {name: backend for name, backend in made.items() if not case.masked or name in TAKE_MASKS}


TAKE_MASKS = ("sdpa", "cudnn", "torch")


def _sdpa_reluctance(case: Case, device: torch.device) -> str | None:
    if case.packed and device.type == "cuda" and flex.obstacle(case, device) is None:
        return "documents would be a mask of all pairs of tokens"
    if device.type == "cpu" and (cpp.obstacle(case, device) or cpp.reluctance(case, device)) is None:
        return "the C++ kernels are faster over short rows"
    return None


def _cudnn_reluctance(device: torch.device) -> str | None:
    return "sdpa takes cuDNN wherever it can"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T) v, causal, where a softcap makes of a score s: softcap * tanh(s / softcap).

    The cap (arXiv 2410.16682; Gemma 2) bounds every score. q [B, H, L, P]; k, v [B, K, S, P], query head h uses head
    h // (H/K); documents: tokens attend to none of another document, L = S; mask [B or 1, 1, L, S], True where a token may
    look, for any L and S, in place of documents and causality; neither: causal, L = S. scale None: P ** -0.5.

    Returns [B, H, L, P] in q's dtype. Differentiable in q, k and v. Backends: `backends`; with a mask, where the one asked
    for takes none, "auto". Fused ones may add gradients in any order unless torch.use_deterministic_algorithms forbids it.
    Raises BackendError, ShapeError. Twin: `reference.attention_torch`.
    """
    (B, H, L, P), (K, S) = q.shape, k.shape[1:3]
    check_divides("query heads", H, "key/value heads", K)
    check_shape("k", k, B=B, K=K, S=S, P=P)
    check_shape("v", v, B=B, K=K, S=S, P=P)
    if documents is not None:
        check_shape("document ids", documents.ids, B=B, L=L)
    if mask is None:
        check_shape("k", k, B=B, K=K, L=L, P=P)
    case = Case(q.dtype, P, documents is not None, mask is not None, softcap is not None)
    return _chosen(case, backend, q.device)(q, k, v, documents=documents, mask=mask, scale=scale, softcap=softcap)


def _chosen(case: Case, wanted: str, device: torch.device) -> Any:
    possible = backends(case)
    if case.masked and wanted in backends(Case(case.dtype)) and wanted not in possible:
        wanted = "auto"
    return choose("attention", wanted, possible, device)
