"""What a rank sends to others in one optimizer step, by formula, before anything runs.

Bytes are those of a ring of n ranks (Thakur et al. 2005, section 4): to gather a tensor of S bytes, or to sum it and leave
every rank a part, each sends (n - 1) / n * S; to sum it for all, twice that. tests/plan/test_communication.py counts the
collectives of real steps, and finds these, neither more nor fewer. Left out: evaluation, checkpoints, what `logging` asks for.

The rank is the first of its tensor ranks and of its data ranks; others may have a row of the vocabulary more, or no bias. Of
context ranks it is any; those at the ends of a row send less than one in the middle.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Literal

import torch
from torch import nn

from nemohybrid.config.model import ModelConfig
from nemohybrid.config.ranks import data_mode, microbatch
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.model.moe.router import Router
from nemohybrid.parallel import gradients
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import is_partial
from nemohybrid.parallel.layout import layout_of
from nemohybrid.plan import context_communication as context
from nemohybrid.plan.axes import axes
from nemohybrid.plan.sends import FP32, FP64, INT64, Kind, Row, Send
from nemohybrid.symbols import parse_pattern


def step_traffic(config: RunConfig, data_ranks: int, shard_ranks: int = 1, part: int | None = None) -> list[Row]:
    """Everything a rank sends in one step of `config`, which must be legal.

    data_ranks share the global batch, each of them perhaps several context ranks, of which this is number `part` (None: one
    in the middle); shard_ranks of all these cut weights, gradients and optimizer state among themselves.
    Raises ConfigError for pipelines and folded experts, whose traffic is not counted yet.
    """
    if not counts(config):
        raise ConfigError(
            "what pipelines and folded experts send is not counted yet. Legal: parallel.pipeline=1, expert=1"
        )
    step = Step(config, data_ranks, shard_ranks, context.middle(config.parallel.context) if part is None else part)
    weights = _cut_weights(step) if shard_ranks > 1 else _copied_weights(step)
    parts = _layers(step), _ends(step), _context_ranks(step), _router_balance(step), _partial_gradients(step)
    return [*chain(*parts), *weights, *_numbers(step)]


def counts(config: RunConfig) -> bool:
    """Whether the formulas know all that `config` sends."""
    return config.parallel.pipeline == 1 and not axes(config, 1).folds


@dataclass(frozen=True)
class Step:
    """What the formulas need to know of a step. `data` ranks share its batch, `shard` of them and of the context ranks cut the
    weights; this is the first of the former, and number `part` of the latter."""

    config: RunConfig
    data: int
    shard: int
    part: int = 0

    @cached_property
    def model(self) -> HybridModel:
        """The first tensor rank's part of it, without memory."""
        with torch.device("meta"):
            context = ParallelContext.imaginary(axes(self.config, 1))
            return HybridModel(self.config.model, context)

    @property
    def cut(self) -> bool:
        """Whether tensor ranks share the tokens of the residual stream."""
        return self.model.context.sequence

    @property
    def rows(self) -> int:
        """Sequences of a microbatch."""
        return microbatch(self.config, self.data)

    @property
    def microbatches(self) -> int:
        """Those of one data rank."""
        return self.config.train.global_batch // self.data // self.rows

    @property
    def share(self) -> context.Share:
        """The rank's tokens of a microbatch."""
        return context.Share(self.config, self.rows, self.part)

    @property
    def tokens(self) -> int:
        """How many these are."""
        return self.share.tokens

    @property
    def token_ranks(self) -> int:
        """Data x context: they have other tokens of the batch, and share weights."""
        return self.data * self.config.parallel.context

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed a second time for their gradients."""
        return self.config.train.recompute == "layer"

    @property
    def keeps_weights(self) -> bool:
        """Whether weights that were gathered stay until the step's last backward pass."""
        return data_mode(self.config.parallel) == "shard_grad"

    @property
    def everyone(self) -> str:
        """The group of all ranks."""
        return "data" if self.config.parallel.tensor == 1 else "tensor" if self.token_ranks == 1 else "world"

    @property
    def token_holders(self) -> str:
        """The group over which the tokens of a global batch lie."""
        return self.everyone if self.cut else "data"

    def rows_of(self, what: str, group: str, sends: Iterable[Send], times: int = 1) -> Iterator[Row]:
        """A row for each kind among `sends`, all of which are repeated; none in a group of one."""
        tensor, data, shard = self.config.parallel.tensor, self.token_ranks, self.shard
        sizes = {"tensor": tensor, "data": data, "world": tensor * data, "shard": shard, "copies": data // shard}
        sizes["context"] = self.config.parallel.context
        number, whole = Counter[Kind](), Counter[Kind]()
        for send in sends if sizes[group] > 1 else ():
            number[send.kind] += times * send.times
            whole[send.kind] += times * send.times * send.size
        role = "data" if group in ("shard", "copies") else group
        for kind in number:
            if number[kind]:
                yield Row(what, role, kind, sizes[group], number[kind], whole[kind])


# --- What crosses the border of matrices that tensor ranks share -------------------------------------------------------

Way = Literal["enter", "leave", "whole", "own"]

FORWARD_BACKWARD: dict[bool, dict[Way, tuple[Kind | None, Kind | None]]] = {
    True: {
        "enter": ("all_gather", "reduce_scatter"),
        "leave": ("reduce_scatter", "all_gather"),
        "whole": ("all_gather", None),
        "own": (None, "all_gather"),
    },
    False: {
        "enter": (None, "all_reduce"),
        "leave": ("all_reduce", None),
        "whole": (None, None),
        "own": (None, None),
    },
}
"""With and without sequence parallelism (the table of parallel/tensor.py)."""


@dataclass(frozen=True)
class Crossing:
    """One use of `TensorRanks`. size: bytes of a token; last: nothing that autograd keeps comes after it in its layer."""

    way: Way
    size: int
    last: bool = False


def through(m: ModelConfig, stream: int) -> list[Crossing]:
    """In as the stream, out as the stream: `M`, `*`, `-`, and a shared expert."""
    return [Crossing("enter", stream), Crossing("leave", stream, last=True)]


def experts(m: ModelConfig, stream: int) -> list[Crossing]:
    """Everyone learns who goes where; with LatentMoE, tokens go to the experts at the latent width."""
    chosen = [Crossing("whole", m.moe_top_k * INT64), Crossing("enter", m.moe_top_k * FP32)]
    if m.moe_latent_size is None:
        return [*chosen, *through(m, stream)]
    latent = stream // m.hidden_size * m.moe_latent_size
    shared = through(m, stream) if m.shared_expert_ffn_hidden_size else []
    return [*chosen, Crossing("enter", latent), Crossing("leave", latent), *shared]


def apart(m: ModelConfig, stream: int) -> list[Crossing]:
    """A mixer that shares no tokens: each rank computes all of it."""
    return [Crossing("whole", stream), Crossing("own", stream, last=True)]


CROSSINGS: dict[str, Callable[[ModelConfig, int], list[Crossing]]] = {
    "M": through,
    "*": through,
    "-": through,
    "E": experts,
}
"""Symbol -> what crosses in one of its layers, in the order of the forward pass. Others are taken to be `apart`."""


def layer_sends(symbol: str, m: ModelConfig, tokens: int, cut: bool, recompute: bool = False) -> Iterator[Send]:
    """Forward and backward pass of one layer over `tokens`. cut: with sequence parallelism.

    Recomputation stops at the last thing that autograd kept: what leaves at the end is not sent again, unless a norm
    follows.
    """
    crossings = CROSSINGS.get(symbol, apart)(m, m.hidden_size * DTYPES[m.dtype].itemsize)
    ends = symbol not in m.output_norm
    for crossing in crossings:
        yield from _passes(crossing, tokens, cut, again=recompute and not (crossing.last and ends))


def _passes(crossing: Crossing, tokens: int, cut: bool, again: bool = False) -> Iterator[Send]:
    """again: the forward pass is repeated."""
    forward, backward = FORWARD_BACKWARD[cut][crossing.way]
    for kind in (forward, backward, forward if again else None):
        if kind:
            yield Send(kind, crossing.size * tokens)


def _layers(step: Step) -> Iterator[Row]:
    for symbol, runs in _runs(step).items():
        sends = layer_sends(symbol, step.config.model, step.tokens, step.cut, step.recomputes)
        yield from step.rows_of(f"{symbol} layers", "tensor", sends, times=step.microbatches * runs)


def _context_ranks(step: Step) -> Iterator[Row]:
    """What layers need of other tokens, what is known of documents, and what drafts read and predict."""
    share, depths = step.share, step.model.mtp_depth
    for symbol, runs in _runs(step).items():
        sends = context.layer_sends(symbol, share, step.recomputes)
        yield from step.rows_of(f"{symbol} layers", "context", sends, times=step.microbatches * runs)
    yield from step.rows_of("documents", "context", context.documents(share, set(_runs(step))), step.microbatches)
    drafts = [*context.draft_tokens(share, depths), *context.draft_targets(share, depths)]
    yield from step.rows_of("drafts", "context", drafts, step.microbatches)
    whole_batch = replace(share, rows=step.rows * step.microbatches)  # its targets are counted first
    yield from step.rows_of("drafts", "context", context.draft_targets(whole_batch, depths))


def _runs(step: Step) -> Counter[str]:
    """Symbol -> how many of its layers a microbatch passes, those of MTP at every depth."""
    pattern = parse_pattern(step.config.model.pattern)
    return Counter(pattern.main) + Counter(pattern.mtp * pattern.mtp_depth)


def _ends(step: Step) -> Iterator[Row]:
    """The model's, and again at each MTP depth: token ids go in; out comes the loss, of which ranks have some columns."""
    tokens, times = step.tokens, step.microbatches * (1 + step.model.mtp_depth)
    stream = step.config.model.hidden_size * step.model.dtype.itemsize
    yield from step.rows_of("embedding", "tensor", _passes(Crossing("leave", stream), tokens, step.cut), times)
    again = step.recomputes and step.model.mtp_depth > 0
    softmax = [Send("all_reduce", FP32 * tokens), Send("all_reduce", 2 * FP32 * tokens)]  # largest; sum and label
    hidden = _passes(Crossing("enter", stream), tokens, step.cut, again)
    yield from step.rows_of("loss", "tensor", [*hidden, *softmax * (1 + again)], times)


def _router_balance(step: Step) -> Iterator[Row]:
    """Loads over the tokens of others, for the gradient of the balancing loss; and of the whole step, for the record."""
    m, routers = step.config.model, [part for part in step.model.modules() if isinstance(part, Router)]
    times = step.microbatches * _runs(step)["E"]
    if m.router.aux_loss == "global":
        yield from step.rows_of("router balance", step.token_holders, [Send("all_reduce", FP64 * m.num_experts)], times)
    else:
        rows = step.rows if m.router.aux_loss == "sequence" else 1
        size = rows * m.num_experts * (FP32 if rows > 1 and step.cut else INT64)  # there the loads come from a product
        for group in ("tensor", "context") if step.cut else ("context",):
            yield from step.rows_of("router balance", group, [Send("all_reduce", size)], times)
    if routers:
        yield from step.rows_of(
            "expert loads", step.token_holders, [Send("all_reduce", len(routers) * FP64 * (m.num_experts + 3))]
        )


def _partial_gradients(step: Step) -> Iterator[Row]:
    """Of what all tensor ranks hold; then a place for every part of which several hold a copy."""
    whole: list[int] = []
    copied: list[int] = []
    for parameter in step.model.parameters():
        rows, *others = layout_of(parameter).tensor_shape
        chunk, number = -(-rows // step.shard), step.part % step.shard
        first, end = min(rows, number * chunk), min(rows, (number + 1) * chunk)
        layout = replace(layout_of(parameter), rows=(first, end))
        if is_partial(layout, step.model.context):
            whole.append((end - first) * math.prod(others))
        copied += [layout.ranks // b.copies * math.prod(b.shape) for b in layout.boxes if b.copies > 1]
    sends = (Send("all_reduce", FP32 * elements) for elements in _buckets([*whole, *copied]))
    yield from step.rows_of("partial gradients", "tensor", sends)


# --- What data ranks send ----------------------------------------------------------------------------------------------


def _copied_weights(step: Step) -> Iterator[Row]:
    sends = (Send("all_reduce", FP32 * elements) for elements in _buckets(p.numel() for p in step.model.parameters()))
    yield from step.rows_of("reduce gradients", "data", sends)


def _buckets(sizes: Iterable[int]) -> Iterator[int]:
    """Elements of each bucket of `parallel.gradients`, of gradients with so many elements."""
    elements = 0
    for size in sizes:
        elements += size
        if elements >= gradients.BUCKET_ELEMENTS:
            yield elements
            elements = 0
    if elements:
        yield elements


@dataclass(frozen=True)
class Weights:
    """Weights that are gathered together. elements: with the padding of FSDP's equal parts; size: bytes of one on the way;
    passes: how often a microbatch uses them; stay: they are not given back between forward and backward pass."""

    elements: int
    size: int
    passes: int
    stay: bool


def _cut_weights(step: Step) -> Iterator[Row]:
    """FSDP: weights are gathered before each use; after it gradients are summed, in fp32, and each rank keeps its part."""
    groups = [group for group in _groups(step) if group.elements]
    forward = [Send("all_gather", g.size * g.elements, _forward(step, g)) for g in groups]
    backward = [Send("all_gather", g.size * g.elements, _backward(step, g)) for g in groups]
    reduced = [Send("reduce_scatter", FP32 * g.elements, _reductions(step, g)) for g in groups]
    between = [Send("all_reduce", FP32 * g.elements // step.shard, _reductions(step, g)) for g in groups]
    yield from step.rows_of("gather weights, forward", "shard", forward)
    yield from step.rows_of("gather weights, backward", "shard", backward)
    yield from step.rows_of("reduce gradients", "shard", reduced)
    yield from step.rows_of("sums over copies", "copies", between)


def _forward(step: Step, weights: Weights) -> int:
    """How often a step gathers them for forward passes; with shard_grad in the first one only."""
    return 1 if step.keeps_weights else step.microbatches * weights.passes


def _backward(step: Step, weights: Weights) -> int:
    """The same for backward passes. In the last microbatch shard_grad gives them back after the first of several."""
    if weights.stay:
        return 0
    return weights.passes - 1 if step.keeps_weights else step.microbatches * weights.passes


def _reductions(step: Step, weights: Weights) -> int:
    """How often their gradients are sent: once a microbatch or a step. In torch 2.13, where a microbatch passes through them
    several times, what earlier microbatches left goes by itself after the first of its backward passes: its own gradient is
    only complete after the last."""
    if step.config.parallel.reduce_every_microbatch:
        return step.microbatches
    return 1 + (weights.passes > 1 and step.microbatches > 1)


def _groups(step: Step) -> Iterator[Weights]:
    """Two of each layer, of weights that are only used as a cast and of others; and one of what is in no layer."""
    model = step.model
    main, repeats = len(model.layers), model.mtp_depth // max(1, len(model.mtp))
    left = _parameters(model)
    for number, unit in enumerate(model.sharding_units()):
        passes, whole = 1 if number < main else repeats, _parameters(unit.module)
        cast = _parameters(*unit.casting) if model.dtype != torch.float32 else set()
        yield Weights(_padded(cast, step.shard), model.dtype.itemsize, passes, stay=False)
        yield Weights(_padded(whole - cast, step.shard), FP32, passes, stay=False)
        left -= whole
    yield Weights(_padded(left, step.shard), FP32, passes=1, stay=True)


def _parameters(*modules: nn.Module) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _padded(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Elements when the rows of each are as many as a multiple of the ranks."""
    return sum(-(-len(p) // ranks) * ranks * p[:1].numel() for p in parameters)


def _numbers(step: Step) -> Iterator[Row]:
    """Single numbers: targets and losses of each head, the square of the gradient norm, what to do after the step."""
    heads = Send("all_reduce", FP32 * (1 + step.model.mtp_depth))
    yield from step.rows_of("targets and losses", "data", [heads, heads])
    for group in ("tensor", "shard"):
        yield from step.rows_of("gradient norm", group, [Send("all_reduce", FP32)])
    yield from step.rows_of("agreement", step.everyone, [Send("all_reduce", INT64)])
