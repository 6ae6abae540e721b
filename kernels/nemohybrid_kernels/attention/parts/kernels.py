"""PyTorch's fused kernels of attention that return the log of the softmax's sum and take it back, each behind one signature.

They are operators that PyTorch calls itself, under names without promises: `Kernel.obstacle` says where they have others.
None of those for CUDA has been run by us; what each wants of its arguments is read in PyTorch's sources, where nothing checks
all of it. Memory-efficient attention, for one, takes the layout of `out` for granted (o_strideM in its kernel_backward.h).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
WIDEST = 256
"""Channels of a head in flash attention."""
aten: Any = torch.ops.aten

# B rows, H query heads, K key/value heads, R = H / K, L queries, S keys, P head dim

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class How:
    """Scores are q k^T times `scale`, plus `bias` [B, 1, L, S] in q's type; where causal, L = S and later keys are hidden."""

    scale: float
    causal: bool
    bias: Tensor | None = None


@dataclass(frozen=True)
class Kernel:
    """One of them.

    forward(q, k, v, how) -> out [B, H, L, P] and the log of the sum [B, H, L], fp32 (fp64 of fp64).
    backward(d_out, q, k, v, out, sums, how) -> gradients of q, k and v.
    q [B, H, L, P]; k, v [B, K, S, P].
    operators: those of aten that it calls -> how many arguments and how many results they had when this was written.
    obstacle: why this torch cannot be asked for it, or None. Looked up once: no graph of torch.compile can read a schema.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    operators: dict[str, tuple[int, int]]
    obstacle: str | None = field(init=False)

    def __post_init__(self) -> None:
        changed = (name for name, known in self.operators.items() if _arity(name) != known)
        object.__setattr__(
            self, "obstacle", next((f"aten::{name} is not that of torch 2.13" for name in changed), None)
        )


def _arity(name: str) -> tuple[int, int] | None:
    """Arguments and results of an operator, or None."""
    operator = getattr(getattr(aten, name, None), "default", None)
    return None if operator is None else (len(operator._schema.arguments), len(operator._schema.returns))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, how.causal, attn_mask=how.bias, scale=how.scale
    )


def _cpu_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, how: How) -> Gradients:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(d_out, q, k, v, out, sums, 0.0, how.causal, attn_mask=how.bias, scale=how.scale)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """No bias; K may be less than H."""
    given = (_in_eights(x) for x in (q, k, v))
    out, sums, *_ = aten._scaled_dot_product_flash_attention(*given, 0.0, how.causal, False, scale=how.scale)
    return out[..., : q.shape[-1]], sums


def _flash_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, how: How) -> Gradients:
    given = (_in_eights(x) for x in (d_out, q, k, v, out))
    rows = (None, None, q.shape[2], k.shape[2])  # of one length
    rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is none of
    backward = aten._scaled_dot_product_flash_attention_backward
    found = backward(*given, sums.contiguous(), *rows, 0.0, how.causal, rng, rng, scale=how.scale)
    return tuple(gradient[..., : q.shape[-1]] for gradient in found)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Every query head has its own keys; and the sums of a head end at a multiple of 32."""
    given = (_in_eights(x) for x in (q, *_repeated(q, k, v)))
    bias = _for_heads(how.bias, q.shape[1])
    out, sums, *_ = aten._scaled_dot_product_efficient_attention(*given, bias, True, 0.0, how.causal, scale=how.scale)
    return out[..., : q.shape[-1]], sums[..., : q.shape[2]]


def _efficient_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, how: How
) -> Gradients:
    given = [_in_eights(x) for x in (d_out, q, *_repeated(q, k, v))]
    out = _in_eights(out.transpose(1, 2)).transpose(1, 2)  # heads lie side by side in a token
    sums = F.pad(sums, (0, -sums.shape[-1] % 32), value=torch.inf).contiguous()
    rng = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that there is none of
    backward = aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    dq, dk, dv, _ = backward(
        *given, _for_heads(how.bias, q.shape[1]), out, sums, rng, rng, 0.0, wanted, how.causal, scale=how.scale
    )
    dq, dk, dv = (gradient[..., : q.shape[-1]] for gradient in (dq, dk, dv))
    return dq, _of_groups(dk, k), _of_groups(dv, v)


def _in_eights(x: Tensor) -> Tensor:
    """Contiguous, the last axis filled up with zeros to a multiple of 8."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)).contiguous() if missing else x.contiguous()


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for every query head."""
    each = q.shape[1] // k.shape[1]
    return (k, v) if each == 1 else (k.repeat_interleave(each, 1), v.repeat_interleave(each, 1))


def _of_groups(gradient: Tensor, of: Tensor) -> Tensor:
    """[B, H, S, P] -> [B, K, S, P] like `of`, summed in fp32."""
    if gradient.shape[1] == of.shape[1]:
        return gradient
    return gradient.unflatten(1, (of.shape[1], -1)).sum(2, dtype=torch.float32)


def _for_heads(bias: Tensor | None, heads: int) -> Tensor | None:
    """[B, 1, L, S] -> [B, H, L, S], rows of which begin at multiples of 16."""
    if bias is None:
        return None
    keys = bias.shape[-1]
    bias = F.pad(bias, (0, -keys % 16))[..., :keys] if keys % 16 else bias
    return bias.expand(-1, heads, -1, -1)


CPU = Kernel(
    "flash attention for CPUs",
    _cpu_forward,
    _cpu_backward,
    {
        "_scaled_dot_product_flash_attention_for_cpu": (7, 2),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (10, 3),
    },
)
FLASH = Kernel(
    "flash attention",
    _flash_forward,
    _flash_backward,
    {"_scaled_dot_product_flash_attention": (7, 9), "_scaled_dot_product_flash_attention_backward": (15, 3)},
)
EFFICIENT = Kernel(
    "memory-efficient attention",
    _efficient_forward,
    _efficient_backward,
    {"_scaled_dot_product_efficient_attention": (8, 4), "_scaled_dot_product_efficient_attention_backward": (13, 4)},
)


def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> Kernel:
    """The fastest that can. Only one on a GPU takes masks, and fp32; it has no limit of width."""
    if device.type == "cpu":
        return CPU
    flash = not masked and dtype in HALVES and head_dim <= WIDEST
    return FLASH if flash and _has_flash(device) else EFFICIENT


def _has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available() and torch.cuda.is_available()
    return built and torch.cuda.get_device_capability(device)[0] >= 8
