"""The state-space scan of Mamba-2 in plain PyTorch: matrix products over chunks, and token by token.

Dimensions: b batch, l length, c chunks, Q tokens of a chunk, G groups, R heads of a group, H = G*R heads, P head
dimension, N state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.checks import document_runs, maths_dtype


def ssd_chunked(
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
) -> tuple[Tensor, Tensor]:
    """The scan as matrix products (Dao & Gu 2024, section 6): attention inside a chunk, a recurrence between chunks.

    Arguments and results as in `nemohybrid_kernels.ssd.ssd_scan`. Every exponent is a decay from an earlier token to a
    later one, hence <= 0: nothing overflows, however strong the decay.
    """
    (batch, L, H, P), G, R, maths = x.shape, B.shape[2], x.shape[2] // B.shape[2], maths_dtype(x)
    Q = min(chunk_size or default_chunk_size(x), L)
    x_chunks, dt_bcQH, B_chunks, C_chunks = (_chunks(t, Q) for t in (x, dt.to(maths), B, C))
    dt_bcQGR = dt_bcQH.unflatten(-1, (G, R))

    step = (dt_bcQGR * A.to(maths).view(G, R)).permute(0, 1, 3, 4, 2)  # log decay of each token, bcGRQ
    run = None if document_ids is None else _runs_of_chunks(document_ids, L, Q)
    decay = _sum_since_start(step, run)
    pair_mask, start_mask, end_mask = _masks(run, decay)
    decay_in, decay_out = decay + start_mask, _sum_of_later(step) + end_mask

    # Elementwise work costs as much as the products here. dt is folded into x once, P numbers a token, and not into
    # the Q x Q weights; the heads of a group share the columns of one product wherever B or C is an operand.
    u = (x_chunks.unflatten(3, (G, R)) * dt_bcQGR.to(x.dtype).unsqueeze(-1)).permute(0, 1, 3, 4, 2, 5)  # bcGRQP
    B_bcGQN, C_bcGQN = B_chunks.transpose(2, 3), C_chunks.transpose(2, 3)
    within = _weights(decay, pair_mask, (C_bcGQN @ B_bcGQN.transpose(-1, -2)).unsqueeze(3)) @ u

    carried, final = _carried(u, B_bcGQN, C_bcGQN, decay_in[..., -1], decay_out, initial_state)
    y = torch.addcmul(within.transpose(3, 4), carried, _exp(decay_in, x).transpose(3, 4))
    y = y.transpose(2, 3).reshape(batch, -1, H, P)[:, :L]
    if D is not None:
        y = torch.addcmul(y, x, D.to(x.dtype).unsqueeze(-1))
    return y, final


def default_chunk_size(x_blHP: Tensor) -> int:
    """The chunk that was fastest, forward and backward: 64, and 32 on a CPU where heads are as narrow as that."""
    return 32 if x_blHP.device.type == "cpu" and x_blHP.shape[-1] <= 32 else 64


def _chunks(t: Tensor, Q: int) -> Tensor:
    """[b, l, ...] -> [b, c, Q, ...]. Zeros fill the last chunk: with dt = 0 they leave the state as it is."""
    missing = -t.shape[1] % Q
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (-1, Q))


def _runs_of_chunks(document_ids: Tensor, L: int, Q: int) -> Tensor:
    """The number of the document of every token, [b, c, 1, 1, Q]; padding belongs to the last one."""
    run = F.pad(document_runs(document_ids), (0, -L % Q), mode="replicate")
    return run.unflatten(1, (-1, Q))[:, :, None, None]


def _sum_since_start(step: Tensor, run: Tensor | None) -> Tensor:
    """Log decay since the chunk began, or the document where one begins inside the chunk.

    In float64, and without what an earlier document has summed up: strong decays there would cost this one its digits.
    What is taken away is the same for all pairs of a document, so no gradient belongs to it.
    """
    total = step.double().cumsum(-1)
    if run is not None:
        begins = F.pad(run[..., 1:] != run[..., :-1], (1, 0))
        at = torch.arange(run.shape[-1], device=run.device)
        first = torch.where(begins, at, 0).cummax(-1).values.expand(step.shape)
        total = total - (total - step).gather(-1, first).detach()
    return total.to(step.dtype)


def _masks(run: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """What to add to log decays: 0 where a state may pass, -inf where it may not.

    From token j to token i of a chunk [.., Q, Q]; from the chunk before to token i [.., Q]; from token j to the end of
    the chunk [.., Q]. A state passes forward in time and never from one document into another.
    """
    Q = like.shape[-1]
    causal = torch.ones(Q, Q, dtype=torch.bool, device=like.device).tril()
    if run is None:
        return _log(causal, like), 0.0, 0.0
    last = run[..., -1:]
    earlier = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1)  # run 0 continues initial_state
    same = run.unsqueeze(-1) == run.unsqueeze(-2)
    return _log(same & causal, like), _log(run == earlier, like), _log(run == last, like)


def _log(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, float("-inf"))


def _sum_of_later(step: Tensor) -> Tensor:
    """Log decay from each token to the end of its chunk. Summed from there: differences of sums lose digits."""
    return F.pad(step[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


class _Weights(torch.autograd.Function):
    """exp(decay_i - decay_j + mask_ij) * CB_ij.

    By hand for the sake of the digits, not of the speed. A token is not decayed on its way to itself, but autograd
    adds and subtracts the gradient of that non-decay, which dwarfs all others where the decay is strong: the fp32
    gradient of A was ten times further off.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, mask: Tensor, CB: Tensor) -> Tensor:
        between = decay.unsqueeze(-1) - decay.unsqueeze(-2)
        factor = between.add_(mask).exp_().to(CB.dtype)
        ctx.save_for_backward(factor, CB)
        ctx.maths = decay.dtype
        return factor * CB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor, CB = ctx.saved_tensors
        dCB = grads[0] * factor
        dbetween = dCB * CB
        dbetween.diagonal(dim1=-2, dim2=-1).zero_()
        ddecay = dbetween.sum(-1, dtype=ctx.maths) - dbetween.sum(-2, dtype=ctx.maths)
        return ddecay, None, dCB.sum(3, keepdim=True)


def _weights(decay_bcGRQ: Tensor, mask: Tensor, CB_bcG1QQ: Tensor) -> Tensor:
    """How much of u_j reaches y_i inside a chunk, [b, c, G, R, Q, Q]."""
    return _Weights.apply(decay_bcGRQ, mask, CB_bcG1QQ)  # pyright: ignore[reportReturnType]


def _exp(log_decay_bcGRQ: Tensor, like: Tensor) -> Tensor:
    return log_decay_bcGRQ.exp().to(like.dtype).unsqueeze(-1)


def _carried(
    u_bcGRQP: Tensor,
    B_bcGQN: Tensor,
    C_bcGQN: Tensor,
    chunk_decay_bcGR: Tensor,
    decay_out: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """C_i times the state before the chunk of token i, bcGQRP, and the state after the last chunk, bHPN."""
    R, P = u_bcGRQP.shape[3], u_bcGRQP.shape[5]
    u_out = (u_bcGRQP * _exp(decay_out, u_bcGRQP)).transpose(3, 4).flatten(-2)  # bcGQ(RP)
    gained = (B_bcGQN.transpose(-1, -2) @ u_out).to(chunk_decay_bcGR.dtype)
    kept = chunk_decay_bcGR.exp().repeat_interleave(P, -1).unsqueeze(-2)  # bcG1(RP)
    before, final = _pass_states(gained, kept, _fold_state(initial_state, gained))
    carried = (C_bcGQN @ before.to(C_bcGQN.dtype)).unflatten(-1, (R, P))
    return carried, final.unflatten(-1, (R, P)).permute(0, 1, 3, 4, 2).flatten(1, 2)


def _pass_states(gained: Tensor, decay: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk, stacked, and the one after the last: state <- decay * state + gained.

    `unbind`, because indexing a chunk out would cost a full tensor of zeros per chunk in the backward pass.
    """
    state, before = initial, []
    for gained_here, decay_here in zip(gained.unbind(1), decay.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(gained_here, state, decay_here)
    return torch.stack(before, dim=1), state


def _fold_state(state_bHPN: Tensor | None, gained_bcGNW: Tensor) -> Tensor:
    """The initial state in the layout of the products, [b, G, N, W = R*P]; zeros where none was given."""
    if state_bHPN is None:
        return torch.zeros_like(gained_bcGNW[:, 0])
    G = gained_bcGNW.shape[2]
    return state_bHPN.to(gained_bcGNW.dtype).unflatten(1, (G, -1)).permute(0, 1, 4, 2, 3).flatten(-2)


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the recurrence as it is written, one token after another, in float64.

    Arguments as in `nemohybrid_kernels.ssd.ssd_scan`; both results are float64.
    """
    (batch, L, H, P), (G, N) = x.shape, B.shape[-2:]
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    B_blHN, C_blHN = (t.repeat_interleave(H // G, dim=2) for t in (B, C))
    state = x.new_zeros(batch, H, P, N) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(L):
        if document_ids is not None and t > 0:
            goes_on = document_ids[:, t] == document_ids[:, t - 1]
            state = state * goes_on.view(batch, 1, 1, 1)
        gained = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B_blHN[:, t].unsqueeze(-2)
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + gained
        outputs.append((state @ C_blHN[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + x * D.double()[:, None]), state
