"""`M`: the Mamba-2 mixer (Dao & Gu 2024, section 7; numerics of Megatron-LM's mamba_mixer.py)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.init import constant, inverse_softplus_dt, log_uniform_A, uniform
from nemohybrid.model.linear import COLUMN, ROW, Linear
from nemohybrid.model.mixer import Mixer, mixer, residual_std
from nemohybrid.model.norm import GatedRMSNorm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import Piece, Shard, parameter
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.ssd import ssd_scan

# B batch, L length, T tokens = B*L, D hidden, H heads, P head dim, I inner = H*P, G groups, N state, C conv channels


@dataclass
class MambaState:
    """All a Mamba-2 layer remembers while generating, the same size after any number of tokens."""

    conv: Tensor  # [B, kernel - 1, C] the last inputs of the convolution
    ssm: Tensor  # [B, H, P, N] fp32


class CausalConv(nn.Module):
    """Depthwise causal convolution over x, B and C, followed by SiLU."""

    def __init__(self, widths: dict[str, int], kernel: int, bias: bool) -> None:
        super().__init__()
        shard, init = Shard(axis=0, over="tensor"), uniform(kernel**-0.5)
        self.weight = parameter(*(Piece(n, (w, kernel), init) for n, w in widths.items()), shard=shard)
        self.bias = parameter(*(Piece(n, (w,), init) for n, w in widths.items()), shard=shard) if bias else None

    def forward(self, x: Tensor, seq: SequenceContext, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, L, C] and the inputs before it -> the same shape, and the last inputs."""
        return causal_conv1d(x, self.weight, self.bias, document_ids=seq.document_ids, initial_state=past)


@mixer("M", "Mamba-2")
class Mamba2(Mixer):
    """Selective state space with scalar decay per head; B and C are shared by the heads of a group.

    in_proj -> (z, x, B, C, dt); conv + SiLU over x, B, C; dt = softplus(dt + dt_bias), without a floor; SSD scan with skip
    D; RMSNorm of y * silu(z) within groups; out_proj. A_log, D, dt_bias and the scan's decays are fp32 throughout.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        heads, head_dim = config.mamba_num_heads or 0, config.mamba_head_dim or 0
        inner, shared = heads * head_dim, config.mamba_num_groups * config.ssm_state_size
        self.heads, self.groups, self.inner, self.chunk_size = heads, config.mamba_num_groups, inner, config.chunk_size
        self.dt_limit = None if config.dt_limit is None else tuple(config.dt_limit)
        convolved = {"x": inner, "B": shared, "C": shared}
        per_head = Shard(axis=0, over="tensor")
        dt_init = inverse_softplus_dt(config.dt_min, config.dt_max, config.dt_init_floor)

        self.in_proj = Linear(
            config.hidden_size,
            {"z": inner, **convolved, "dt": heads},
            role="in_proj",
            std=config.init_std,
            bias=config.linear_bias,
            shard=COLUMN,
        )
        self.conv = CausalConv(convolved, config.conv_kernel, config.conv_bias)
        self.A_log = parameter(Piece("", (heads,), log_uniform_A()), shard=per_head)
        self.D = parameter(Piece("", (heads,), constant(1.0)), shard=per_head)
        self.dt_bias = parameter(Piece("", (heads,), dt_init), shard=per_head)
        self.norm = GatedRMSNorm(inner, config.mamba_num_groups, config.norm_epsilon)
        self.out_proj = Linear(
            inner, config.hidden_size, role="out_proj", std=residual_std(config), bias=config.linear_bias, shard=ROW
        )

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        zxbcdt = self.in_proj(x).view(seq.batch, seq.length, -1)
        z, xbc, dt = zxbcdt.split([self.inner, sum(self.in_proj.widths[1:4]), self.heads], dim=-1)
        past = self._past(seq)
        xbc, conv_state = self.conv(xbc, seq, past and past.conv)
        y, ssm_state = self._scan(xbc, self.time_steps(dt), seq, past and past.ssm)
        if seq.cache is not None:
            seq.cache.states[self] = MambaState(conv_state, ssm_state)
        return self.out_proj(self.norm(y, z).reshape(seq.tokens, -1))

    def _past(self, seq: SequenceContext) -> MambaState | None:
        """What the cache remembers, zeroed in rows where a new document begins with these tokens."""
        past = seq.cache.states.get(self) if seq.cache else None
        goes_on = seq.goes_on()
        if past is None or goes_on is None:
            return past
        return MambaState(past.conv * goes_on[:, None, None], past.ssm * goes_on[:, None, None, None])

    def time_steps(self, dt: Tensor) -> Tensor:
        """Raw dt [B, L, H] -> positive fp32 steps, clamped only where the configuration asks for it."""
        dt = F.softplus(dt.float() + self.dt_bias.float())
        return dt if self.dt_limit is None else dt.clamp(*self.dt_limit)

    def _scan(self, xbc: Tensor, dt: Tensor, seq: SequenceContext, past: Tensor | None) -> tuple[Tensor, Tensor]:
        x, B, C = xbc.split(self.in_proj.widths[1:4], dim=-1)
        y, state = ssd_scan(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            self.D.float(),
            document_ids=seq.document_ids,
            initial_state=past,
            chunk_size=self.chunk_size,
        )
        return y.flatten(2), state
