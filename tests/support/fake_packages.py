"""Packages that nobody has here, with their real signatures: each computes what it promises from what it is given.

They refuse what the real ones refuse: types, layouts, arguments that exclude each other.
"""

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def put(monkeypatch: Any, module: str, **contents: Any) -> None:
    """Install a fake `module` and the packages above it."""
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        fake = ModuleType(name := ".".join(names[:depth]))
        fake.__spec__, fake.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, fake)
    for name, value in contents.items():
        setattr(sys.modules[module], name, value)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """mamba-ssm 2.3.2. Token by token; a state stays while seq_idx does, and before the row it is 0."""
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    assert chunk_size & (chunk_size - 1) == 0
    assert dt.shape == (batch, L, H)
    assert A.shape == (H,)
    assert B.shape == C.shape == (batch, L, G, N)
    assert D is None or D.shape == (H,)
    assert initial_states is None or initial_states.shape == (batch, H, P, N)
    assert seq_idx is None or (seq_idx.shape == (batch, L) and seq_idx.dtype == torch.int32)
    assert z is dt_bias is cu_seqlens is None
    assert not dt_softplus
    assert not return_varlen_states
    state = x.new_zeros(batch, H, P, N) if initial_states is None else initial_states
    before, ys = torch.zeros(batch, dtype=torch.int32), []
    B, C = (heads.repeat_interleave(H // G, 2) for heads in (B, C))
    for t in range(L):
        if seq_idx is not None:
            state = state * (seq_idx[:, t] == before)[:, None, None, None]
            before = seq_idx[:, t]
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        ys.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1) + (0 if D is None else D[:, None] * x)
    return (y.to(x.dtype), state) if return_final_states else y.to(x.dtype)


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """causal-conv1d 1.6.2: x [B, C, L], channels last in memory. Tap by tap."""
    (batch, C, L), K = x.shape, weight.shape[1]
    assert activation in (None, "silu", "swish")
    assert 2 <= K <= 4, "causal_conv1d only supports width between 2 and 4"
    assert x.stride(1) == 1, "documents and states want channels last"
    assert C % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    assert seq_idx is None or initial_states is None, "initial_states must be None if seq_idx is not None"
    assert not return_final_states
    assert final_states_out is None
    history = x.new_zeros(batch, C, K - 1)
    if initial_states is not None:
        assert initial_states.dtype == x.dtype
        assert initial_states.stride(1) == 1
        history = initial_states
    inputs, y = torch.cat([history, x], 2), x.new_zeros(batch, C, L)
    for k in range(K):
        seen = inputs[:, :, k : k + L]
        if seq_idx is not None:
            at = torch.arange(L) - (K - 1 - k)
            seen = seen * ((at >= 0) & (seq_idx[:, at.clamp(min=0)] == seq_idx)).unsqueeze(1)
        y = y + seen * weight[:, k, None]
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation else y


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: list[int], scale: float, softcap: float) -> Tensor:
    """[T, H, P], one sequence after the other."""
    repeats, outs = q.shape[1] // k.shape[1], []
    for start, end in pairwise(ends):
        qs, ks, vs = (x[start:end].transpose(0, 1) for x in (q, k, v))
        scores = qs.float() @ ks.repeat_interleave(repeats, 0).float().mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + torch.full((end - start, end - start), -torch.inf).triu(1)
        outs.append((scores.softmax(-1).to(q.dtype) @ vs.repeat_interleave(repeats, 0)).transpose(0, 1))
    return torch.cat(outs)


def _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal) -> list[int]:
    assert q.ndim == k.ndim == v.ndim == 3
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    ends = cu_seqlens_q.tolist()
    assert (ends[0], ends[-1]) == (0, len(q))
    assert ends == sorted({*ends})
    return ends


def flash2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash_attn.flash_attn_varlen_func of flash-attn 2.8.3."""
    ends = _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)
    assert max_seqlen_q == max_seqlen_k >= max(b - a for a, b in pairwise(ends))
    return _attend(q, k, v, ends, softmax_scale or q.shape[-1] ** -0.5, softcap)


def flash3_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_interface.flash_attn_varlen_func of flash-attn 3."""
    ends = _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)
    assert max_seqlen_q == max_seqlen_k >= max(b - a for a, b in pairwise(ends))
    return _attend(q, k, v, ends, softmax_scale or q.shape[-1] ** -0.5, softcap)


def flash4_varlen(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    aux_tensors=None,
    return_lse=False,
):
    """flash_attn.cute.flash_attn_varlen_func of flash-attn 4, which also returns the sums of its softmax, or None."""
    ends = _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)
    assert not softcap
    return _attend(q, k, v, ends, softmax_scale or q.shape[-1] ** -0.5, softcap), None
