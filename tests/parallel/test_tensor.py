"""What tensor ranks compute together, beyond gradients: text, scores, layers of a user's own, and what is refused."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from forked import run_world
from layouts import Layout, compare, run_config

from nemohybrid.errors import DataError
from nemohybrid.generate.engine import generate_tokens
from nemohybrid.generate.sampling import Sampling
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.init import constant, normal
from nemohybrid.model.linear import Linear
from nemohybrid.model.mixer import Mixer
from nemohybrid.model.sequence import SequenceContext
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.layout import Piece, parameter
from nemohybrid.train.evaluation import score_batch
from nemohybrid.train.finite import first_bad_tensor
from nemohybrid.train.parity import difference, observe, share_of, synthetic_batch
from nemohybrid.train.random_streams import RandomStreams

LAYOUTS = [Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(tensor=4, sequence=True)]


@pytest.fixture
def on_ranks(tmp_path_factory):
    """`on_ranks(layout, action) -> what action(context) returned on each rank`, JSON values."""

    def run(layout: Layout, action) -> list:
        folder = tmp_path_factory.mktemp("world")

        def member(rank: int) -> None:
            (folder / f"result{rank}").write_text(json.dumps(action(layout.of_this_rank())))

        failures = run_world(layout.ranks, member, folder)
        assert not failures, failures[0].read_text()
        return [json.loads((folder / f"result{rank}").read_text()) for rank in range(layout.ranks)]

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", ["every_option", "latent", "tied"])
def test_logits_and_scores_are_those_of_one_rank(on_ranks, layout, model):
    config = run_config(model)
    batch = synthetic_batch(config, 0)

    def outputs(context: ParallelContext) -> list:
        net = HybridModel.create(config.model, 1, context)
        with torch.no_grad():
            logits = net(batch.tokens, SequenceContext(*batch.tokens.shape, batch.document_ids))
            drafts = net.forward_mtp(batch.tokens)
        return [t.tolist() for t in (logits, *drafts, score_batch(net, batch).detach())]

    wanted = outputs(ParallelContext.single())
    for rank, got in enumerate(on_ranks(layout, outputs)):
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(
                torch.tensor(one),
                torch.tensor(other),
                rtol=2e-5,
                atol=2e-5,
                msg=lambda m, r=rank, n=number: f"{r} {n} {m}",
            )


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence=True), Layout(tensor=4)], ids=str)
def test_tensor_ranks_write_the_text_of_one_rank(on_ranks, layout):
    """Prompts of odd lengths, one token at a time: what sequence parallelism could not cut."""
    config = run_config()

    def text(context: ParallelContext) -> list:
        net = HybridModel.create(config.model, 1, context)
        return [
            generate_tokens(net, [[5, 9, 2], [7]], 12, Sampling(temperature=t, top_k=0, top_p=1.0)) for t in (0.0, 1.0)
        ]

    wanted = text(ParallelContext.single())
    assert all(got == wanted for got in on_ranks(layout, text))


def test_a_backward_pass_through_all_logits_equals_one_rank(on_ranks):
    config = run_config()
    tokens = synthetic_batch(config, 0).tokens

    def gradient(context: ParallelContext) -> list:
        net = HybridModel.create(config.model, 1, context)
        net(tokens).logsumexp(-1).square().sum().backward()
        return net.layers[0].mixer.A_log.grad.tolist()

    wanted = gradient(ParallelContext.single())
    got = on_ranks(Layout(tensor=2, sequence=True), gradient)
    torch.testing.assert_close(torch.tensor(got[0] + got[1]), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_tokens_that_do_not_divide_are_refused_before_anything_is_sent(on_ranks):
    config = run_config()

    def attempt(context: ParallelContext) -> str:
        net = HybridModel.create(config.model, 1, context)
        with pytest.raises(DataError) as refused:
            net(torch.ones(1, 15, dtype=torch.int64))
        return str(refused.value)

    for told in on_ranks(Layout(tensor=2, sequence=True), attempt):
        assert (
            told == "15 tokens cannot be shared by 2 tensor ranks. Legal: a multiple of 2, or parallel.sequence=false"
        )


class Shift(Mixer):
    """Looks one token back, and knows nothing of ranks."""

    def __init__(self, config, context) -> None:
        super().__init__(config, context)
        self.project = Linear(config.hidden_size, config.hidden_size, role="shift", std=0.3)
        self.share = parameter(Piece("", (config.hidden_size,), normal(0.5)))
        self.offset = parameter(Piece("", (config.hidden_size,), constant(0.1)))

    def forward(self, x, seq):
        rows = x.view(seq.batch, seq.length, -1)
        before = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], dim=1)
        begins = (seq.positions(x.device) == 0)[..., None]
        return self.project((rows + self.share * before.masked_fill(begins, 0.0)).flatten(0, 1)) + self.offset


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=2, data=2, shard=2, sequence=True)], ids=str)
def test_a_mixer_that_knows_no_ranks_is_given_all_tokens(layout, monkeypatch):
    """Cut over tokens it would miss the last token of its neighbour, and with its gradient summed it would be wrong twice."""
    import layouts

    monkeypatch.setitem(importlib.import_module("nemohybrid.model.mixer")._mixers, "-", Shift)
    layouts.one_rank.cache_clear()
    try:
        comparison = compare(layout, "every_option", steps=2)
    finally:
        layouts.one_rank.cache_clear()
    assert comparison.faults(1e-5) == []
    assert "gradient.layers.2.mixer.share" in comparison.tensors


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence=True), Layout(data=2, shard=2)], ids=str)
def test_a_number_that_is_none_is_found_by_all_ranks_though_one_has_it(on_ranks, layout):
    """The ranks compute together to the end: a rank that stopped looking would leave its peers waiting."""
    from nemohybrid.train.build import build_model

    config = layout.configured(run_config())

    def look(context: ParallelContext) -> str:
        net, shared = build_model(config, context)
        with torch.no_grad():
            weight = shared.parameters["layers.2.mixer.fc1.weight"]
            weight[0, 0] = torch.nan if context.rank == 1 else weight[0, 0]
        return first_bad_tensor(net, share_of(synthetic_batch(config, 0), context), 1, context)

    told = on_ranks(layout, look)
    assert told[0] == told[1]
    assert "rank" in told[0], told
    assert "layers.2" in told[0] or "weight" in told[0], told


@pytest.mark.parametrize("model", ["latent", "every_option"])
def test_bf16_weights_that_are_sent_as_bf16_train_as_if_they_were_not(on_ranks, model):
    """The cast comes before the exchange instead of after it; gradients are added in fp32 either way. Tensor by tensor."""
    config = run_config(model, recompute="layer")
    config.model = replace(config.model, dtype="bfloat16")
    cut, whole = Layout(data=2, shard=2), Layout(data=2)

    def faults(context: ParallelContext) -> list[str]:
        got = observe(cut.configured(config), context)
        apart = replace(context, shard=Group(), mesh=None)
        wanted = observe(whole.configured(config), apart)
        found = {name: difference(name, got.tensors.get(name), tensor) for name, tensor in wanted.tensors.items()}
        assert got.numbers == pytest.approx(wanted.numbers, rel=1e-6)
        return [f"{name}: {one.relative:.1e}" for name, one in found.items() if not one.error <= 1e-5 * one.scale]

    assert on_ranks(cut, faults) == [[], []]


class Dropout(Shift):
    """Forgets some channels of some tokens."""

    def forward(self, x, seq):
        return super().forward(torch.nn.functional.dropout(x, 0.4), seq)


def test_tensor_ranks_forget_the_same_and_so_does_a_recomputation(on_ranks, monkeypatch):
    """What a mixer of one's own draws: each rank alone would train another weight and call it the same."""
    monkeypatch.setitem(importlib.import_module("nemohybrid.model.mixer")._mixers, "-", Dropout)
    found = {}
    for recompute in ("none", "layer"):
        config = run_config(recompute=recompute)

        def weights(context: ParallelContext, config=config) -> list:
            RandomStreams(context, 1).start()
            seen = observe(Layout(tensor=2, sequence=True).configured(config), context, 2)
            return [seen.tensors[f"weight.layers.2.mixer.{name}"].tolist() for name in ("share", "project.weight")]

        first, second = on_ranks(Layout(tensor=2, sequence=True), weights)
        assert first == second, "tensor ranks hold different copies of one weight"
        found[recompute] = first
    assert found["none"] == found["layer"], "a layer that is computed again draws other numbers"


def test_ranks_end_a_text_at_the_same_token_though_their_logits_differ(on_ranks, monkeypatch):
    """The last bit of a logit may depend on the machine; a rank that stops alone leaves its peers waiting."""
    config = run_config()

    def text(context: ParallelContext) -> list:
        net = HybridModel.create(config.model, 1, context)
        with monkeypatch.context() as patch:
            patch.setattr(
                Sampling, "choose", lambda self, logits, generator: torch.full(logits.shape[:1], context.rank)
            )
            return generate_tokens(net, [[5, 9]], 3, Sampling(temperature=1.0, top_k=0, top_p=1.0), eod=1)

    assert on_ranks(Layout(tensor=2), text) == [[[0, 0, 0]], [[0, 0, 0]]]
