"""`HybridModel`: embedding, the layers of a pattern, final norm, output projection."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemohybrid.config.model import ModelConfig
from nemohybrid.errors import ConfigError, DataError
from nemohybrid.model import attention, mamba2, mlp  # noqa: F401 - they register their symbols
from nemohybrid.model.embedding import VocabularyMatrix
from nemohybrid.model.init import allocate, initialize
from nemohybrid.model.layer import Layer
from nemohybrid.model.linear import casting_modules
from nemohybrid.model.moe import layer as moe_layer  # noqa: F401
from nemohybrid.model.mtp import MTPBlock, build_mtp, shifted
from nemohybrid.model.norm import RMSNorm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import attach, layout_of
from nemohybrid.parallel.tensor import TensorRanks
from nemohybrid.symbols import parse_pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Name in the configuration -> compute dtype."""

_DERIVED = (
    "vocab_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "shared_expert_ffn_hidden_size",
)
"""Sizes that may be left empty in a configuration and must be filled in before a model is built."""


class HybridModel(nn.Module):
    """A language model assembled from `config.pattern`.

    Parameters are fp32 and computation is in `config.dtype`. `HybridModel.create` draws the weights from a seed of yours,
    the plain constructor from seed 0; under `torch.device("meta")` there are none until `materialize`.
    `recompute` keeps only the input of each layer for the backward pass.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext | None = None) -> None:
        super().__init__()
        context = context or ParallelContext.single()
        if empty := [name for name in _DERIVED if getattr(config, name) is None]:
            raise ConfigError(
                f"model.{', model.'.join(empty)} not set; nemohybrid.config.derive.derive_sizes fills them"
            )
        self.config = config
        self.dtype = DTYPES[config.dtype]
        self.recompute = False
        pattern = parse_pattern(config.pattern)
        self.context = context
        self.embedding = VocabularyMatrix(config, context)
        self.layers = nn.ModuleList(Layer(symbol, config, context) for symbol in pattern.main)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.output = self.embedding if config.tie_embeddings else VocabularyMatrix(config, context)
        self.mtp, self.mtp_depth = build_mtp(pattern.mtp, pattern.mtp_depth, config, context), pattern.mtp_depth
        if self.embedding.weight.device.type != "meta":
            initialize(self, seed=0)

    @classmethod
    def create(cls, config: ModelConfig, seed: int = 0, context: ParallelContext | None = None) -> "HybridModel":
        """A model with initial weights drawn from `seed`, on the context's device."""
        context = context or ParallelContext.single()
        with torch.device("meta"):
            model = cls(config, context)
        return model.materialize(context.device, seed)

    def materialize(self, device: torch.device | str, seed: int) -> "HybridModel":
        """Allocate a meta model on `device` and draw its initial weights. Returns self."""
        allocate(self, device)
        initialize(self, seed)
        return self

    def sharding_units(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """Modules whose weights are only needed while they run, each with those of its parts that use a cast of theirs.

        Of weights that are used several times in a pass, as those of a repeated MTP block, there is no common cast: their
        gradients must add up in fp32.
        """
        for layer in self.layers:
            yield layer, list(casting_modules(layer))
        for block in self.mtp:
            for layer in block.get_submodule("layers").children():
                yield layer, list(casting_modules(layer)) if len(self.mtp) == self.mtp_depth else []

    def __deepcopy__(self, memo: dict[int, Any]) -> "HybridModel":
        """A copy with its layouts, such as an average of weights is; a copied `Parameter` loses them."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = deepcopy(self.__dict__, memo)
        for ours, theirs in zip(self.parameters(), twin.parameters(), strict=True):
            attach(theirs, layout_of(ours))
        return twin

    def forward(self, input_ids: Tensor, seq: SequenceContext | None = None) -> Tensor:
        """input_ids [B, L] -> logits [B, L, vocab_size] in the compute dtype. `seq` None: one document a row."""
        batch, length = input_ids.shape
        seq = seq or SequenceContext(batch, length)
        return self.output.logits(self.hidden_states(input_ids, seq), seq).view(batch, length, -1)

    def tensor_ranks(self, seq: SequenceContext) -> TensorRanks:
        """How the tokens of these rows lie on the tensor ranks. While generating all ranks have all tokens."""
        return TensorRanks(self.context.tensor, cut=self.context.sequence and seq.cache is None)

    def hidden_states(self, input_ids: Tensor, seq: SequenceContext | None = None) -> Tensor:
        """input_ids [B, L] -> [B*L, D], after the final norm: what the output projection and draft heads read.

        With sequence parallelism it is this rank's equal run of the B*L tokens. Raises DataError where they do not divide.
        """
        batch, length = input_ids.shape
        if not input_ids.numel():
            raise DataError(f"input_ids are {[batch, length]}: there is no token")
        seq = seq or SequenceContext(batch, length)
        if (seq.batch, seq.length) != (batch, length):
            described = [seq.batch, seq.length]
            raise DataError(f"input_ids are {[batch, length]}, but the sequence context describes {described}")
        seq.ranks = self.tensor_ranks(seq)
        seq.ranks.check(seq.tokens)
        x = self.embedding.embed(input_ids, self.dtype, seq)
        x = self.final_norm(self._run(self.layers, x, seq))
        seq.advance()
        return x

    def forward_mtp(self, input_ids: Tensor, seq: SequenceContext | None = None) -> list[Tensor]:
        """input_ids [B, L] -> for each MTP depth k = 0, 1, ... logits [B, L-1-k, vocab_size].

        Position t of depth k predicts token t + 2 + k, having seen those up to t + 1 + k. Empty without MTP; no position
        where the row has none to predict.
        """
        batch, length = input_ids.shape
        seq = seq or SequenceContext(batch, length)
        hidden = self.mtp_hidden_states(self.hidden_states(input_ids, seq), input_ids, seq)
        logits = (self.output.logits(h, seq).view(batch, length, -1) for h in hidden)
        return [draft[:, : max(0, length - 1 - k)] for k, draft in enumerate(logits)]

    def mtp_hidden_states(self, hidden: Tensor, input_ids: Tensor, seq: SequenceContext) -> list[Tensor]:
        """What `hidden_states` returned for input_ids [B, L] -> for each MTP depth k hidden states [B*L, D].

        The last k + 1 positions of a row or a document would need tokens that come after it: what stands there means nothing.
        """
        results: list[Tensor] = []
        for depth in range(self.mtp_depth):
            hidden = self.mtp_step(depth, hidden, shifted(input_ids, depth + 1), seq)
            results.append(hidden)
        return results

    def mtp_step(self, depth: int, hidden: Tensor, next_ids: Tensor, seq: SequenceContext) -> Tensor:
        """One depth: hidden [B*L, D] of the depth before, the tokens [B, L] that follow -> [B*L, D].

        A depth beyond those of the pattern runs the last block again.
        """
        block = self.mtp[min(depth, len(self.mtp) - 1)]
        assert isinstance(block, MTPBlock)
        x = block.combine(self.embedding.embed(next_ids, self.dtype, seq), hidden)
        return block.final_norm(self._run(block.layers, x, seq))

    def _run(self, layers: Iterable[nn.Module], x: Tensor, seq: SequenceContext) -> Tensor:
        for layer in layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, seq, use_reentrant=False)  # draws again what it drew  # pyright: ignore[reportAssignmentType]
            else:
                x = layer(x, seq)
        return x
