"""PyTorch's fused kernels of attention for GPUs, computed in plain PyTorch and put where a CPU has none.

They are called through PyTorch's own schemas. They refuse what the real ones refuse, read memory as those take it to lie, and
give a query that sees nothing NaN.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def put() -> Iterator[None]:
    """While this is open, a CPU has them."""
    library = torch.library.Library("aten", "IMPL")
    for function in (flash, flash_backward, efficient, efficient_backward):
        library.impl(function.__doc__, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """_scaled_dot_product_flash_attention"""
    assert query.dtype in HALVES
    assert dropout_p == 0
    check_flash(query, key, value, is_causal)
    out, sums = attended(query, *repeated(query, key, value), None, is_causal, scale)
    nothing = torch.empty(0)
    return out, sums, nothing, nothing, query.shape[2], key.shape[2], nothing, nothing, nothing


def flash_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    philox_seed,
    philox_offset,
    *,
    scale=None,
):
    """_scaled_dot_product_flash_attention_backward"""
    assert {x.dtype for x in (grad_out, query, key, value, out)} <= {query.dtype}
    assert cum_seq_q is cum_seq_k is None, "rows of one length"
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert philox_seed.dtype == torch.uint64
    check_flash(query, key, value, is_causal)
    assert logsumexp.dtype == torch.float32
    sums = logsumexp.as_strided(query.shape[:3], (query.shape[1] * max_q, max_q, 1))
    every = repeated(query, key, value)
    dq, dk, dv = gradients(grad_out, query, *every, out, sums, None, is_causal, scale)
    return dq, *(x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (dk, dv))


def check_flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    assert all(x.shape[-1] % 8 == 0 and x.shape[-1] <= 256 and x.stride(-1) == 1 for x in (query, key, value))
    assert not causal or query.shape[2] == key.shape[2], "of others the last query is that of the last key"


def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """_scaled_dot_product_efficient_attention"""
    check_efficient(query, key, value, attn_bias)
    assert compute_log_sumexp
    out, sums = attended(query, key, value, attn_bias, is_causal, scale)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    rest = sums.new_full((*sums.shape[:2], -sums.shape[2] % 32), torch.inf)
    return out, torch.cat([sums, rest], 2), torch.empty(()), torch.empty(())


def efficient_backward(
    grad_out_,
    query,
    key,
    value,
    attn_bias,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    dropout_p,
    grad_input_mask,
    is_causal=False,
    *,
    scale=None,
):
    """_scaled_dot_product_efficient_attention_backward"""
    check_efficient(query, key, value, attn_bias)
    (B, H, L, P), tokens = query.shape, out.transpose(1, 2)
    assert list(grad_input_mask) == [True, True, True, False]
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert logsumexp.dtype == torch.float32
    assert logsumexp.stride(0) % 8 == logsumexp.stride(1) % 8 == 0
    assert logsumexp.shape == (B, H, -(-L // 32) * 32)
    assert logsumexp[:, :, L:].isinf().all(), "as the way there leaves them"
    out = tokens.as_strided((B, L, H, P), (tokens.stride(0), H * P, tokens.stride(2), 1)).transpose(1, 2)
    found = gradients(grad_out_, query, key, value, out, logsumexp[:, :, :L], attn_bias, is_causal, scale)
    return *found, None


def check_efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    assert query.dtype in (*HALVES, torch.float32)
    assert query.shape[1] == key.shape[1] == value.shape[1], "keys are not repeated"
    for x in (query, key, value):
        assert x.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in x.stride()[:-1])
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2])
        assert bias.dtype == query.dtype
        assert bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float):
    scores = scored(q, k, bias, causal, scale)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
):
    weights = torch.exp(scored(q, k, bias, causal, scale) - sums[..., None])
    d, delta = d_out.float(), (d_out.float() * out.float()).sum(-1, keepdim=True)
    d_scores = weights * (d @ v.float().mT - delta) * scale
    found = (d_scores @ k.float(), d_scores.mT @ q.float(), weights.mT @ d)
    return tuple(gradient.to(q.dtype) for gradient in found)


def scored(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = q.float() @ k.float().mT * scale
    scores = scores if bias is None else scores + bias.float()
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf) if causal else scores


def repeated(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
