"""`M`: the Mamba-2 mixer (Dao & Gu 2024, section 7; numerics of Megatron-LM's mamba_mixer.py)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.init import constant, inverse_softplus_dt, log_uniform_A, uniform
from nemohybrid.model.linear import COLUMN, ROW, Linear
from nemohybrid.model.mamba2_shared_rows import HeadsPart, by_heads, by_states
from nemohybrid.model.mixer import Mixer, mixer, residual_std
from nemohybrid.model.norm import GatedRMSNorm, normed, optional_norm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import Piece, Shard, parameter
from nemohybrid_kernels.backend import decide
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.mixer import backends as mixer_backends
from nemohybrid_kernels.mixer import mamba2_mixer
from nemohybrid_kernels.ssd import ssd_scan

# B batch, L length, T tokens = B*L, D hidden, H heads, P head dim, I inner = H*P, G groups, N state, C conv channels


@dataclass
class MambaState:
    """All a Mamba-2 layer remembers while generating, the same size after any number of tokens.

    A state cannot be run backwards. Where tokens may be taken back, it can be made once more from the first tokens of the
    last call: convolution and scan are repeated for those that stay, the projections are not.
    """

    conv: Tensor  # [B, kernel - 1, C] the last inputs of the convolution
    ssm: Tensor  # [B, H, P, N] fp32
    after: "Callable[[int], MambaState] | None" = None  # the first tokens of the last call -> the state after them
    fed: int = 0  # tokens of the last call

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` of the last call."""
        assert self.after is not None, "the cache was not rewindable when these tokens were fed"
        assert tokens <= self.fed, f"{tokens} tokens are to be taken back, but the last call fed {self.fed}"
        self.fed -= tokens
        state = self.after(self.fed)
        self.conv, self.ssm = state.conv, state.ssm


@dataclass(frozen=True)
class Call:
    """What a call gives the recurrence: the projections of its tokens, their documents, and the past."""

    xbc: Tensor  # [B, L, C] before the convolution
    dt: Tensor  # [B, L, H] raw
    ids: Tensor | None  # [B, L]
    past: MambaState | None
    goes_on: Tensor | None  # [B] False where the past is of another document; None: it goes on in every row

    def before(self) -> tuple[Tensor | None, Tensor | None]:
        """Where convolution and scan begin: the past, zeroed in rows where a new document begins with these tokens."""
        if self.past is None or self.goes_on is None:
            return (self.past.conv, self.past.ssm) if self.past else (None, None)
        return self.past.conv * self.goes_on[:, None, None], self.past.ssm * self.goes_on[:, None, None, None]

    def first(self, tokens: int) -> "Call":
        """The call, had it ended after `tokens`."""
        ids = None if self.ids is None else self.ids[:, :tokens]
        return replace(self, xbc=self.xbc[:, :tokens], dt=self.dt[:, :tokens], ids=ids)


class CausalConv(nn.Module):
    """Depthwise causal convolution over x, B and C, followed by SiLU."""

    def __init__(self, widths: dict[str, int], kernel: int, bias: bool, context: ParallelContext) -> None:
        super().__init__()
        self.backend = "auto"
        cut: dict[str, Any] = {"shard": Shard(axis=0), "context": context}
        init = uniform(kernel**-0.5)
        self.weight = parameter(*(Piece(n, (w, kernel), init) for n, w in widths.items()), **cut)
        self.bias = parameter(*(Piece(n, (w,), init) for n, w in widths.items()), **cut) if bias else None

    def forward(
        self, x: Tensor, ids: Tensor | None, past: Tensor | None, channels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, L, C], its document ids and the inputs before it -> the same shape, and the last inputs.

        channels [C]: which they are; None: all.
        """
        weight = self.weight if channels is None else self.weight[channels]
        bias = self.bias if channels is None or self.bias is None else self.bias[channels]
        return causal_conv1d(x, weight, bias, document_ids=ids, initial_state=past, backend=self.backend)


@mixer("M", "Mamba-2")
class Mamba2(Mixer):
    """Selective state space with scalar decay per head; B and C are shared by the heads of a group.

    in_proj -> (z, x, B, C, dt); conv + SiLU over x, B, C; dt = softplus(dt + dt_bias), without a floor; SSD scan with skip
    D; RMSNorm of y * silu(z) within groups; out_proj. A_log, D, dt_bias and the scan's decays are fp32 throughout.
    Tensor ranks share the groups, and their heads with them. Context ranks share the heads once more, or pass states on.
    """

    shares_tokens = shares_rows = True

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        heads, head_dim = config.mamba_num_heads or 0, config.mamba_head_dim or 0
        inner, shared = heads * head_dim, config.mamba_num_groups * config.ssm_state_size
        ranks = context.tensor.size
        self.heads, self.groups, self.inner = heads // ranks, config.mamba_num_groups // ranks, inner // ranks
        self.chunk_size, self.backend = config.chunk_size, "auto"
        self.mixer_backend = "auto"  # "triton" or "cpp": all between the projections in one; "separate": one by one
        self.mixer_recompute = False  # of that one operator, if it is Triton's
        self.state, self.way, self.has_whole_rows = config.ssm_state_size, context.ways.mamba, context.context.size == 1
        self.dt_limit = None if config.dt_limit is None else (config.dt_limit[0], config.dt_limit[1])
        convolved = {"x": inner, "B": shared, "C": shared}
        per_head: dict[str, Any] = {"shard": Shard(axis=0), "context": context}
        dt_init = inverse_softplus_dt(config.dt_min, config.dt_max, config.dt_init_floor)

        self.in_proj = Linear(
            config.hidden_size,
            {"z": inner, **convolved, "dt": heads},
            role="in_proj",
            std=config.init_std,
            bias=config.linear_bias,
            shard=COLUMN,
            context=context,
        )
        self.conv = CausalConv(convolved, config.conv_kernel, config.conv_bias, context)
        self.A_log = parameter(Piece("", (heads,), log_uniform_A()), **per_head)
        self.D = parameter(Piece("", (heads,), constant(1.0)), **per_head)
        self.dt_bias = parameter(Piece("", (heads,), dt_init), **per_head)
        state, epsilon = self.state, config.norm_epsilon
        self.B_norm, self.C_norm = (optional_norm(config.mamba_bc_norm, state, epsilon, "always") for _ in "BC")
        self.x_norm = optional_norm(config.mamba_x_norm, head_dim, epsilon, "always")
        self.norm = GatedRMSNorm(inner, config.mamba_num_groups, config.norm_epsilon, context)
        self.out_proj = Linear(
            inner,
            config.hidden_size,
            role="out_proj",
            std=residual_std(config),
            bias=config.linear_bias,
            shard=ROW,
            context=context,
        )

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        zxbcdt = self.in_proj(seq.enter(x)).view(seq.batch, seq.length, -1)
        if seq.cache is None and self.is_fused(zxbcdt):
            return seq.leave(self.out_proj(self._all_at_once(zxbcdt, seq.document_ids).reshape(seq.tokens, -1)))
        z, xbc, dt = zxbcdt.split([self.inner, sum(self.in_proj.widths[1:4]), self.heads], dim=-1)
        if seq.is_shared:
            y = (by_heads if self.way == "heads" else by_states)(self, xbc, dt, seq)
            return seq.leave(self.out_proj(self.norm(y, z).reshape(seq.tokens, -1)))
        call = Call(xbc, dt, seq.document_ids, self._past(seq), seq.goes_on())
        y, state = self._recur(call)
        if seq.cache is not None:
            seq.cache.states[self] = state
            if seq.cache.rewindable:
                state.fed, state.after = seq.length, partial(self._state_after, call)
        return seq.leave(self.out_proj(self.norm(y, z).reshape(seq.tokens, -1)))

    def is_fused(self, like: Tensor) -> bool:
        """Whether rows of `like`'s type and device go through one operator."""
        return self.fused_backend(like) is not None

    def fused_backend(self, like: Tensor) -> str | None:
        """The backend of that operator where it is fast, and no part is asked for otherwise. It knows no norms of x, B and
        C, no state to go on from, and no rows that ranks share."""
        parts = {self.backend, self.conv.backend, self.norm.backend}
        extras = self.x_norm or self.B_norm or self.C_norm
        if (
            not self.has_whole_rows
            or self.mixer_backend == "separate"
            or extras is not None
            or not parts <= {"auto", "triton", "cpp"}
        ):
            return None
        backends = mixer_backends(like.dtype, self.inner // self.heads, self.state, self.norm.group_size)
        backend = decide("mamba2_mixer", self.mixer_backend, backends, like.device).backend
        return None if backend == "torch" else backend

    def _all_at_once(self, zxbcdt: Tensor, ids: Tensor | None) -> Tensor:
        """zxbcdt [B, L, ...] -> y [B, L, I], normed."""
        return mamba2_mixer(
            zxbcdt,
            self.conv.weight,
            self.conv.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self.D.float(),
            self.norm.weight,
            heads=self.heads,
            groups=self.groups,
            state=self.state,
            group_size=self.norm.group_size,
            eps=self.norm.epsilon,
            document_ids=ids,
            dt_limit=self.dt_limit,
            chunk_size=self.chunk_size,
            recompute=self.mixer_recompute,
            backend=self.mixer_backend,
        )

    def _past(self, seq: SequenceContext) -> MambaState | None:
        """What the cache remembers, without its `after`: a chain of them would hold on to all that was ever fed."""
        past = seq.cache.states.get(self) if seq.cache else None
        return past and MambaState(past.conv, past.ssm)

    def _recur(self, call: Call) -> tuple[Tensor, MambaState]:
        """y [B, L, I] of a call, and the state after it."""
        return self.recurrence(call.xbc, call.dt, call.ids, *call.before(), HeadsPart(self.heads, self.groups))

    def recurrence(
        self, xbc: Tensor, dt: Tensor, ids: Tensor | None, conv: Tensor | None, ssm: Tensor | None, part: HeadsPart
    ) -> tuple[Tensor, MambaState]:
        """xbc [B, L, C] before the convolution and raw dt [B, L, H] of these heads, and the states before them -> y [B, L, I],
        and the states after it."""
        xbc, last = self.conv(xbc, ids, conv, part.channels)
        y, ssm = self.scan(self.scan_inputs(xbc, self.time_steps(dt, part), part), ids, ssm)
        return y, MambaState(last, ssm)

    def _state_after(self, call: Call, tokens: int) -> MambaState:
        """The state after the first `tokens` of a call."""
        if tokens > 0:
            return self._recur(call.first(tokens))[1]
        assert call.past is not None, "a cache that has seen nothing has no states"
        return call.past

    def time_steps(self, dt: Tensor, part: HeadsPart | None = None) -> Tensor:
        """Raw dt [B, L, H] -> positive fp32 steps, clamped only where the configuration asks for it."""
        bias = self.dt_bias if part is None else self.dt_bias[part.own]
        dt = F.softplus(dt.float() + bias.float())
        return dt if self.dt_limit is None else dt.clamp(*self.dt_limit)

    def scan_inputs(self, xbc: Tensor, dt: Tensor, part: HeadsPart | None = None) -> tuple[Tensor, ...]:
        """What `ssd_scan` takes: x [B, L, H, P], dt, A [H], B and C [B, L, G, N], D [H]."""
        part = part or HeadsPart(self.heads, self.groups)
        states = part.groups * self.state
        x, B, C = xbc.split([xbc.shape[-1] - 2 * states, states, states], dim=-1)
        return (
            normed(x.unflatten(-1, (part.heads, -1)), self.x_norm),
            dt,
            -torch.exp(self.A_log.float())[part.own],
            normed(B.unflatten(-1, (part.groups, -1)), self.B_norm),
            normed(C.unflatten(-1, (part.groups, -1)), self.C_norm),
            self.D.float()[part.own],
        )

    def scan(self, inputs: tuple[Tensor, ...], ids: Tensor | None, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """y [B, L, I] and the state after it, from the state before it."""
        how = {"document_ids": ids, "initial_state": past, "chunk_size": self.chunk_size, "backend": self.backend}
        y, state = ssd_scan(*inputs, **how)
        return y.flatten(2), state
