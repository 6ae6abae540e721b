"""`*`: grouped-query causal attention."""

from functools import partial

import torch
from torch import Tensor

from nemohybrid.config.model import ModelConfig
from nemohybrid.model.linear import COLUMN, ROW, Linear
from nemohybrid.model.mixer import Mixer, mixer, residual_std
from nemohybrid.model.norm import normed, optional_norm
from nemohybrid.model.rope import rotate
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.context_parallel.attention import attend_by_heads
from nemohybrid.parallel.context_parallel.ring import ring_attention
from nemohybrid_kernels.attention import Documents, attention

# B batch, L length, S past + length, T tokens = B*L, D hidden, H query heads, K key/value heads, P head dim


class KeyValueCache:
    """Keys and values of all tokens so far, [B, K, S, P]; room is doubled when it runs out, so that appending is cheap."""

    def __init__(self) -> None:
        self.length = 0
        self.store: Tensor | None = None  # [2, B, K, capacity, P]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, K, L, P]; returns all of them, [B, K, S, P]."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.store is None or self.store.shape[3] < self.length:
            self._grow(keys)
        assert self.store is not None
        self.store[0, :, :, start : self.length] = keys
        self.store[1, :, :, start : self.length] = values
        return self.store[0, :, :, : self.length], self.store[1, :, :, : self.length]

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens`."""
        self.length -= tokens

    def _grow(self, like: Tensor) -> None:
        batch, heads, _, width = like.shape
        bigger = like.new_empty(2, batch, heads, 2 * self.length, width)
        if self.store is not None:
            bigger[:, :, :, : self.store.shape[3]] = self.store
        self.store = bigger


@mixer("*", "attention")
class Attention(Mixer):
    """Grouped-query causal attention. No positional embedding by default (Nemotron-H, section 2); RoPE as an option.

    Documents in `seq` never attend to each other. Tensor ranks share the query heads, and with them the key/value heads;
    where there are fewer of those than ranks, neighbours hold the same one. Context ranks share them once more, or send keys
    and values round.
    """

    shares_tokens = shares_rows = True

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        heads, groups = config.num_attention_heads or 0, config.num_query_groups or 0
        self.head_dim = config.head_dim or 0
        self.rope_theta = config.attention.rope_theta if config.attention.position_embedding == "rope" else None
        self.softcap, self.backend, self.ring_backend = config.attention.softcap, "auto", "auto"
        self.rings = context.context.size > 1 and context.ways.attention == "ring"
        qk_norm, epsilon = config.attention.qk_norm, config.norm_epsilon
        self.q_norm, self.k_norm = (optional_norm(qk_norm, self.head_dim, epsilon, "always") for _ in "qk")
        self.v_norm = optional_norm(config.attention.v_norm, self.head_dim, epsilon, "always")
        q, kv = heads * self.head_dim, groups * self.head_dim
        self.qkv = Linear(
            config.hidden_size,
            {"q": q, "k": kv, "v": kv},
            role="qkv",
            std=config.init_std,
            bias=config.linear_bias,
            shard=COLUMN,
            context=context,
            parts={"k": groups, "v": groups},
        )
        self.heads, self.groups, _ = (width // self.head_dim for width in self.qkv.widths)
        self.out_proj = Linear(
            q,
            config.hidden_size,
            role="o_proj",
            std=residual_std(config),
            bias=config.linear_bias,
            shard=ROW,
            context=context,
        )

    def forward(self, x: Tensor, seq: SequenceContext) -> Tensor:
        """x [T, D] -> [T, D]."""
        q, k, v = self._split_heads(self.qkv(seq.enter(x)), seq)
        q, k, v = normed(q, self.q_norm), normed(k, self.k_norm), normed(v, self.v_norm)
        if self.rope_theta is not None:
            positions = seq.positions(x.device)
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        documents = mask = None
        if seq.is_shared:
            return seq.leave(self.out_proj(self._attend_shared(q, k, v, seq).transpose(1, 2).reshape(seq.tokens, -1)))
        if seq.cache is None:
            documents = seq.documents(x.device)
        else:
            mask = seq.attention_mask(x.device)
            k, v = seq.cache.states.setdefault(self, KeyValueCache()).append(k, v)
        out = self._attend(q, k, v, mask, documents)
        return seq.leave(self.out_proj(out.transpose(1, 2).reshape(seq.tokens, -1)))

    def _attend_shared(self, q: Tensor, k: Tensor, v: Tensor, seq: SequenceContext) -> Tensor:
        """`_attend` for this rank's tokens of rows that others have more of."""
        if self.rings:
            return ring_attention(q, k, v, seq.segments, seq.context, self.softcap, self.ring_backend)
        documents = seq.documents(q.device)
        attend = partial(self._attend, mask=None, documents=documents)
        return attend_by_heads(q, k, v, attend, seq.context)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents | None = None
    ) -> Tensor:
        return attention(q, k, v, documents=documents, mask=mask, softcap=self.softcap, backend=self.backend)

    def _split_heads(self, qkv: Tensor, seq: SequenceContext) -> tuple[Tensor, ...]:
        """[T, q+k+v] -> q [B, H, L, P], k and v [B, K, L, P]."""
        parts = torch.split(qkv.view(seq.batch, seq.length, -1), self.qkv.widths, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
