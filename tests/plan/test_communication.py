"""The formula for what a rank sends is what it does send: number of collectives and bytes, none left over on either side."""

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch._dynamo  # this and the next two are slow, and every rank would import them by itself
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from forked import run_world
from layouts import Layout, run_config
from traffic import Collective, Traffic, totals

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.mlp import MLP
from nemohybrid.parallel import gradients
from nemohybrid.parallel.collectives import gathered, largest
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.expert.exchange import all_to_all
from nemohybrid.parallel.tensor import TensorRanks
from nemohybrid.plan import communication
from nemohybrid.plan.communication import Row, layer_sends, step_traffic
from nemohybrid.train.balance import LoadBalance
from nemohybrid.train.build import build_model
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.parity import share_of, synthetic_batch
from nemohybrid.train.step import compute_gradients, update

ROOT = Path(__file__).parents[2]
Totals = dict[tuple[str, str, int], tuple[int, int]]
"""(group, kind, ranks) -> number of collectives, bytes of the whole tensors."""


@dataclass(frozen=True)
class Case:
    """A layout, a tiny model, and how it is trained. microbatches: of a data rank."""

    layout: Layout
    model: str = "every_option"
    microbatches: int = 2
    microbatch: int = 1
    recompute: str = "none"
    dtype: str = "float32"
    every: bool = False
    documents: bool = True

    def config(self) -> RunConfig:
        rows = self.layout.data * self.microbatches * self.microbatch
        config = self.layout.configured(run_config(self.model, rows, recompute=self.recompute))
        config.train.microbatch, config.model.dtype = self.microbatch, self.dtype
        config.parallel.reduce_every_microbatch = self.every
        config.data.reset_documents = self.documents
        return config

    def __str__(self) -> str:
        return f"{self.layout}-{self.model}-{self.microbatches}x{self.microbatch}-{self.recompute}-{self.dtype}"


CASES = [
    Case(Layout(tensor=2)),
    Case(Layout(tensor=2), "latent", recompute="layer"),
    Case(Layout(tensor=2, sequence=True), "latent", microbatch=2),
    Case(Layout(tensor=2, sequence=True), recompute="layer", microbatch=2),
    Case(Layout(tensor=2, sequence=True), "tied", recompute="layer"),
    Case(Layout(tensor=4, sequence=True), recompute="layer"),  # more ranks than key/value heads
    Case(Layout(data=2), "tied"),
    Case(Layout(data=2, shard=2), microbatches=3),
    Case(Layout(data=2, shard=2), microbatches=1, recompute="layer", dtype="bfloat16"),
    Case(Layout(data=4, shard=4), "tied", every=True),
    Case(Layout(data=2, shard=2, mode="shard_grad"), recompute="layer"),
    Case(Layout(data=4, shard=2, mode="hybrid"), microbatches=1),
    Case(Layout(tensor=2, data=2, shard=2, sequence=True), "latent", recompute="layer", dtype="bfloat16"),
    Case(Layout(tensor=2, data=2, sequence=True), "tied", dtype="bfloat16"),
    Case(Layout(context=4, shard=4, method="ring+states"), recompute="layer"),  # ranks at the ends, and in the middle
    Case(Layout(context=2, method="all_to_all"), "latent", microbatch=2, dtype="bfloat16", documents=False),
    Case(Layout(tensor=2, context=2, sequence=True, method="all_to_all+states"), "tied_by_sequence", recompute="layer"),
    Case(Layout(context=2), "forced", 1),  # neither attention nor drafts
    Case(Layout(context=2, data=2, shard=2, mode="hybrid", method="ring+all_to_all"), "tied", 1, dtype="bfloat16"),
]


def send_a_step(config: RunConfig, context: ParallelContext) -> list[Collective]:
    """What `Trainer.train_step` does with others, on synthetic rows."""
    model, shared = build_model(config, context)
    optimizer, balance = build_optimizer(shared.parameters.values(), config.optim), LoadBalance(model, context)
    batch = share_of(synthetic_batch(config, 0, config.data.reset_documents), context)
    with Traffic(context) as sent:
        compute_gradients(model, batch, config.train.microbatch or 1, context, shared)
        norm = gradients.gradient_norm(shared.parameters.values(), context)
        balance.collect()
        largest(0, context)
        update(shared.parameters.values(), optimizer, config.optim.clip_grad_norm, norm)
        balance.update_bias()
    return sent.take()


Sending = Callable[[ParallelContext], list[list[Collective]]]


def on_context_ranks(
    layout: Layout, send: Sending, folder: Path, config: RunConfig | None = None
) -> list[list[list[Collective]]]:
    """`send` on all ranks of a layout -> what the first rank returned, and those that share its rows and no matrix."""

    def member(rank: int) -> None:
        found = send(layout.of_this_rank(config))
        (folder / f"sent{rank}").write_text(json.dumps([[vars(one) for one in part] for part in found]))

    failures = run_world(layout.ranks, member, folder)
    assert not failures, failures[0].read_text()
    texts = [(folder / f"sent{part * layout.tensor}").read_text() for part in range(layout.context)]
    return [[[Collective(**one) for one in part] for part in json.loads(text)] for text in texts]


def on_first_of(layout: Layout, send: Sending, folder: Path) -> list[list[Collective]]:
    """What the first rank returned."""
    return on_context_ranks(layout, send, folder)[0]


def expected(rows: Iterable[Row], layout: Layout) -> Totals:
    """By the names of groups as they are known there: if context ranks are the whole world, they are its data ranks."""
    number, whole = Counter(), Counter()
    for row in rows:
        group = "data" if row.group == "context" and layout.context == layout.ranks else row.group
        number[group, row.kind, row.ranks] += row.number
        whole[group, row.kind, row.ranks] += row.whole
    return {key: (number[key], whole[key]) for key in sorted(number)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_sends_exactly_what_the_formula_says(case, tmp_path):
    config, layout = case.config(), case.layout
    everyone = on_context_ranks(layout, lambda context: [send_a_step(config, context)], tmp_path, config)
    for part, (sent,) in enumerate(everyone):
        rows = step_traffic(config, layout.data, layout.shard, part)
        assert totals(sent) == expected(rows, layout), f"context rank {part}"
        assert sum(one.sent for one in sent) == pytest.approx(sum(row.sent for row in rows), rel=1e-12)


def test_one_rank_sends_nothing():
    assert step_traffic(run_config(), data_ranks=1) == []


def test_large_gradients_go_in_buckets(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET_ELEMENTS", 3000)
    case = Case(Layout(data=2))
    (sent,) = on_first_of(case.layout, lambda context: [send_a_step(case.config(), context)], tmp_path)
    rows = step_traffic(case.config(), data_ranks=2)
    assert next(row.number for row in rows if row.what == "reduce gradients") > 3
    assert totals(sent) == expected(rows, case.layout)


# --- Layer by layer: no hidden gathers ---------------------------------------------------------------------------------

LAYERS = {"M": {}, "*": {}, "-": {}, "E": {}, "E latent": {"moe_latent_size": 8}}
LAYERS |= {
    f"{name}, no shared expert": LAYERS[name] | {"shared_expert_ffn_hidden_size": 0} for name in ("E", "E latent")
}
DENSE = {
    True: (["all_gather", "reduce_scatter"], ["all_gather", "reduce_scatter"]),
    False: (["all_reduce"], ["all_reduce"]),
}
"""With and without sequence parallelism: the kinds of a dense layer's collectives in the forward and the backward pass."""


def layer_config(name: str, dtype: str = "float32") -> RunConfig:
    config = run_config()
    config.model = replace(config.model, pattern=name[0], output_norm="", dtype=dtype, **LAYERS[name])
    return config


def send_a_layer(config: RunConfig, context: ParallelContext) -> list[list[Collective]]:
    """Forward and backward pass of a single layer over two rows."""
    model = HybridModel.create(config.model, context=context)
    seq = SequenceContext(2, config.data.sequence_length)
    seq.ranks = model.tensor_ranks(seq)
    tokens = seq.tokens // (seq.ranks.group.size if seq.ranks.cut else 1)
    x = torch.ones(tokens, config.model.hidden_size, dtype=model.dtype, requires_grad=True)
    with Traffic(context) as sent:
        y = model.layers[0](x, seq)
        forward = sent.take()
        y.backward(torch.ones_like(y))
    return [forward, sent.take()]


@pytest.fixture(scope="module", params=[True, False], ids=["tokens cut", "tokens whole"])
def layers(request, tmp_path_factory):
    """Whether tensor ranks share the tokens, and for each of `LAYERS` what its passes send, in one world for all."""
    configs = [layer_config(name, dtype="bfloat16") for name in LAYERS]

    def send(context: ParallelContext) -> list[list[Collective]]:
        return [part for config in configs for part in send_a_layer(config, context)]

    passes = on_first_of(Layout(tensor=2, sequence=request.param), send, tmp_path_factory.mktemp("layers"))
    return request.param, dict(zip(LAYERS, zip(passes[::2], passes[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_no_hidden_collectives(name, layers):
    cut, passes = layers
    if name in "M*-":
        assert tuple([one.kind for one in part] for part in passes[name]) == DENSE[cut]
    sent = Counter((one.kind, one.whole) for part in passes[name] for one in part)
    config = layer_config(name, dtype="bfloat16")
    sends = layer_sends(name[0], config.model, tokens=2 * config.data.sequence_length, cut=cut)
    assert sent == Counter((send.kind, send.size) for send in sends)
    assert {(one.group, one.ranks) for part in passes[name] for one in part} == {("tensor", 2)}


@pytest.mark.parametrize("cut", [True, False], ids=["tokens cut", "tokens whole"])
def test_a_mixer_that_shares_no_tokens_is_given_all_of_them(cut):
    sends = list(layer_sends("?", run_config().model, tokens=32, cut=cut))
    assert sends == [communication.Send("all_gather", 32 * 24 * 4)] * (2 if cut else 0)


# --- The count itself --------------------------------------------------------------------------------------------------


def hidden_gather(self: MLP, x: torch.Tensor, seq: SequenceContext) -> torch.Tensor:
    """An MLP whose backward pass gathers once more than it must."""
    out = self.summand(seq.enter(x))
    out.register_hook(lambda gradient: gathered(gradient, seq.ranks.group)[: len(gradient)])
    return seq.leave(out)


def test_a_gather_hidden_in_a_backward_pass_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(MLP, "forward", hidden_gather)
    forward, backward = on_first_of(
        Layout(tensor=2, sequence=True), lambda context: send_a_layer(layer_config("-"), context), tmp_path
    )
    assert len(forward) == 2
    assert [one.kind for one in backward] == ["all_gather", "all_gather", "reduce_scatter"]
    assert backward[1].whole == 2 * backward[0].whole, "each rank sent all 32 tokens, not its 16"


def send_by_hand(context: ParallelContext) -> list[list[Collective]]:
    """Three fp32 numbers of a rank through the doors of torch.distributed."""
    x = torch.ones(3)
    with Traffic(context) as sent:
        dist.all_reduce(x, group=context.tensor.handle)
        dist.all_gather([x.clone(), x.clone()], x, group=context.tensor.handle)
        dist.reduce_scatter(x, [x.clone(), x.clone()], group=context.data.handle)
        TensorRanks(context.tensor, cut=True).enter(x)
        all_to_all(x, [1, 2], [1 + context.tensor.rank] * 2, context.tensor)()
        dist.broadcast(x, src=0)
    return [sent.take()]


def test_every_door_is_watched(tmp_path):
    (sent,) = on_first_of(Layout(tensor=2, data=2), send_by_hand, tmp_path)
    assert [(one.kind, one.group, one.ranks, one.whole) for one in sent] == [
        ("all_reduce", "tensor", 2, 12),
        ("all_gather", "tensor", 2, 24),
        ("reduce_scatter", "data", 2, 24),
        ("all_gather", "tensor", 2, 24),
        ("all_to_all", "tensor", 2, 8),  # of three numbers one stays
        ("broadcast", "world", 4, 12),
    ]
    assert [one.sent for one in sent[:5]] == [12, 12, 12, 12, 8]


# --- What a user learns from it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 4])
def test_what_the_data_modes_cost(microbatches):
    """Bytes a parameter with eight data ranks: bf16 weights before each pass, fp32 gradients once."""
    given = ["data=shakespeare", "data.tokenizer=byte", "model=tiny", "train.microbatch=1"]
    config = load_config([*given, f"train.global_batch={8 * microbatches}"])
    parameters = sum(p.numel() for p in HybridModel.create(config.model).parameters())

    def bytes_each(mode: str, shard: int) -> float:
        parallel = replace(config.parallel, data_mode=mode)
        rows = step_traffic(replace(config, parallel=parallel), data_ranks=8, shard_ranks=shard)
        return sum(row.sent for row in rows if row.group == "data") / parameters

    assert bytes_each("full_shard", 8) == pytest.approx(7 / 8 * (4 * microbatches + 4), rel=0.02)
    assert bytes_each("shard_grad", 8) == pytest.approx(7 / 8 * 6, rel=0.1)  # the vocabulary is sent in fp32
    assert bytes_each("hybrid", 2) == pytest.approx(1 / 2 * (4 * microbatches + 4) + 3 / 4 * 4, rel=0.02)
    assert bytes_each("replicate", 1) == pytest.approx(7 / 8 * 8, rel=0.001)


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    return importlib.import_module("communication_table")


def test_the_page_on_layouts_says_the_same_of_context_ranks(script):
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    for ranks, length in ((8, 65536), (8, 1048576), (64, 1048576)):
        costs = script.communication_of_context_ranks.shared_line("", "nemotron3_super", ranks, length)[4:8]
        costs = ["32 heads do not divide" if cost == "-" else cost for cost in costs]
        assert f"| {' | '.join([f'{ranks}, {length:,}', *costs])} |" in page


def test_the_page_is_what_the_formula_says(script):
    page = script.PAGE.read_text(encoding="utf-8")
    lines = [script.recipe_line(script.BY_MODE), *(script.layer_line(*layer) for layer in script.LAYERS)]
    for part in [*(f"| {' | '.join(cells)} |" for cells in lines), script.communication_of_context_ranks.section()]:
        assert part in page, f"run scripts/bench/communication_table.py: the page has no\n{part}"
