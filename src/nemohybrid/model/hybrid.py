"""`HybridModel`: embedding, the layers of a pattern, final norm, output projection."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
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
from nemohybrid.model.moe import layer as moe_layer
from nemohybrid.model.mtp import MTPBlock, build_mtp
from nemohybrid.model.norm import RMSNorm
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.model.stage import Stage, all_of
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.context_parallel.moves import shifted
from nemohybrid.parallel.data import Unit
from nemohybrid.parallel.layout import attach, layout_of
from nemohybrid.parallel.tensor import TensorRanks
from nemohybrid.precision.binding import Binding
from nemohybrid.precision.clock import Clock
from nemohybrid.symbols import parse_pattern
from nemohybrid_kernels.backend import Choice

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

    With `stages` it is what a pipeline rank holds: the layers of these stages under their numbers in the whole model, and of
    embedding, final norm, output projection and MTP blocks what the stages need. `schedule` is the order in which
    microbatches pass them (`parallel.schedule`). `repeats` counts steps that were computed again, since exchanges between
    experts were short of room; who looks at a step is told by `before_repeat` to forget it. `precision` is what has filled
    its products, where something has, and `clock` what these know of the run.
    """

    embedding: VocabularyMatrix  # on the first stage, and on the last where it is tied or MTP blocks read it
    final_norm: RMSNorm  # this and the next on the last stage
    output: VocabularyMatrix

    def __init__(
        self, config: ModelConfig, context: ParallelContext | None = None, stages: Sequence[Stage] = ()
    ) -> None:
        super().__init__()
        context = context or ParallelContext.single()
        if empty := [name for name in _DERIVED if getattr(config, name) is None]:
            raise ConfigError(
                f"model.{', model.'.join(empty)} not set; nemohybrid.config.derive.derive_sizes fills them"
            )
        self.config = config
        self.dtype = DTYPES[config.dtype]
        self.recompute, self.schedule = False, "1f1b"
        self.kernels: list[Choice] = []  # which backend runs each operator, once that is decided
        self.precision: Binding | None = None
        self.clock = Clock()
        self.repeats, self.before_repeat = 0, list[Callable[[], None]]()
        self.context, self.stages = context, tuple(stages or all_of(config))
        first, last = self.stages[0].is_first, self.stages[-1].is_last
        pattern = parse_pattern(config.pattern)
        self.mtp_depth = pattern.mtp_depth
        on_both_ends = bool(config.tie_embeddings or self.mtp_depth)
        if first or (last and on_both_ends):
            self.embedding = VocabularyMatrix(config, context)
        self.layers = nn.ModuleList()
        for number, symbol in self._own_layers():
            self.layers.add_module(str(number), Layer(symbol, config, context))
        if last:
            self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.output = self.embedding if config.tie_embeddings else VocabularyMatrix(config, context)
        self.mtp = build_mtp(pattern.mtp, self.mtp_depth if last else 0, config, context)
        if on_both_ends and first != last:
            _mark_end(self.embedding, 0 if first else 1)
        if torch.empty(0).device.type != "meta":
            initialize(self, seed=0)

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        seed: int = 0,
        context: ParallelContext | None = None,
        stages: Sequence[Stage] = (),
    ) -> "HybridModel":
        """A model with initial weights drawn from `seed`, on the context's device."""
        context = context or ParallelContext.single()
        with torch.device("meta"):
            model = cls(config, context, stages)
        return model.materialize(context.device, seed)

    def _own_layers(self) -> Iterator[tuple[int, str]]:
        for stage in self.stages:
            yield from stage.layers.items()

    def materialize(self, device: torch.device | str, seed: int) -> "HybridModel":
        """Allocate a meta model on `device` and draw its initial weights. Returns self."""
        allocate(self, device)
        initialize(self, seed)
        return self

    def sharding_units(self, stage: Stage | None = None) -> Iterator[Unit]:
        """Modules whose weights are only needed while they run, each with those of its parts that use a cast of theirs.

        stage: of this one alone. Of weights that are used several times in a pass, as those of a repeated MTP block, there
        is no common cast: their gradients must add up in fp32.
        """
        for number in dict(self._own_layers()) if stage is None else stage.layers:
            yield self._unit(self.layers.get_submodule(str(number)))
        for block in self.mtp if stage is None or stage.is_last else ():
            for layer in block.get_submodule("layers").children():
                yield self._unit(layer, casts=len(self.mtp) == self.mtp_depth)

    def _unit(self, layer: nn.Module, casts: bool = True) -> Unit:
        experts = [part for part in layer.modules() if isinstance(part, moe_layer.Experts) and part.is_folded]
        casting = [part for part in casting_modules(layer) if part not in experts] if casts else []
        return Unit(layer, casting, experts, casts)

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
        seq = seq or self._plain(batch, length)
        return self.output.logits(self.hidden_states(input_ids, seq), seq).view(batch, length, -1)

    def tensor_ranks(self, seq: SequenceContext) -> TensorRanks:
        """How the tokens of these rows lie on the tensor ranks. While generating all ranks have all tokens."""
        return TensorRanks(self.context.tensor, cut=self.context.sequence and seq.cache is None)

    def hidden_states(
        self,
        input_ids: Tensor,
        seq: SequenceContext | None = None,
        stage: Stage | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, L] -> [B*L, D], after the final norm: what the output projection and draft heads read.

        With sequence parallelism it is this rank's equal run of the B*L tokens. Raises DataError where they do not divide.

        stage: only through the layers of this one, from `x`, what the stage before returned (None for the first); the final
        norm is part of the last.
        """
        assert stage or len(self.stages) == 1, "of several stages one must be named"
        stage = stage or self.stages[0]
        seq = self._described(input_ids, seq)
        if stage.is_first:
            x = self.embedding.embed(input_ids, self.dtype, seq)
        assert x is not None, "only the first stage starts from nothing"
        states = self._run((self.layers.get_submodule(str(number)) for number in stage.layers), x, seq)
        if stage.is_last:
            states = self.final_norm(states)
        elif states is x:
            states = states.clone()  # FSDP warns of a stage that returns a view of what it was given
        seq.advance()
        return states

    def _described(self, input_ids: Tensor, seq: SequenceContext | None) -> SequenceContext:
        batch, length = input_ids.shape
        if not input_ids.numel():
            raise DataError(f"input_ids are {[batch, length]}: there is no token")
        seq = seq or self._plain(batch, length)
        if (seq.batch, seq.length) != (batch, length):
            described = [seq.batch, seq.length]
            raise DataError(f"input_ids are {[batch, length]}, but the sequence context describes {described}")
        if seq.cache is None and seq.context.size != self.context.context.size:  # each rank generates whole rows
            shared = f"{self.context.context.size} ranks share the rows of this model"
            raise DataError(f"{shared}, but the sequence context describes {seq.context.size}")
        seq.ranks = self.tensor_ranks(seq)
        seq.ranks.check(seq.tokens)
        return seq

    def _plain(self, batch: int, length: int) -> SequenceContext:
        """One document a row."""
        return SequenceContext(batch, length, context=self.context.context)

    def forward_mtp(self, input_ids: Tensor, seq: SequenceContext | None = None) -> list[Tensor]:
        """input_ids [B, L] -> for each MTP depth k = 0, 1, ... logits [B, L-1-k, vocab_size].

        Position t of depth k predicts token t + 2 + k, having seen those up to t + 1 + k. Empty without MTP; no position
        where the row has none to predict. For whole rows: raises DataError where ranks share them.
        """
        if self.context.context.size > 1:
            raise DataError("drafts are cut off where a row ends, which one of the ranks that share it cannot know")
        batch, length = input_ids.shape
        seq = seq or self._plain(batch, length)
        hidden = self.mtp_hidden_states(self.hidden_states(input_ids, seq), input_ids, seq)
        logits = (self.output.logits(h, seq).view(batch, length, -1) for h in hidden)
        return [draft[:, : max(0, length - 1 - k)] for k, draft in enumerate(logits)]

    def mtp_hidden_states(self, hidden: Tensor, input_ids: Tensor, seq: SequenceContext) -> list[Tensor]:
        """What `hidden_states` returned for input_ids [B, L] -> for each MTP depth k hidden states [B*L, D].

        The last k + 1 positions of a row or a document would need tokens that come after it: what stands there means nothing.
        """
        results: list[Tensor] = []
        for depth in range(self.mtp_depth):
            hidden = self.mtp_step(depth, hidden, shifted(input_ids, depth + 1, seq.context), seq)
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


def _mark_end(matrix: VocabularyMatrix, end: int) -> None:
    """Both ends of the pipeline hold it, start from the same values, and add up their gradients."""
    attach(matrix.weight, replace(layout_of(matrix.weight), end=end))
