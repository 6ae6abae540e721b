"""Folded experts inside a model: what is sent, a step that was short of room, evaluations of unequal ranks."""

import json
from dataclasses import replace

import fake_deep_ep
import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from forked import run_world
from layouts import Layout, run_config
from traffic import Traffic

from nemohybrid.model.sequence import SequenceContext
from nemohybrid.observe.output_norms import OutputNorms
from nemohybrid.parallel import expert
from nemohybrid.parallel.context import Axes, Group, ParallelContext
from nemohybrid.parallel.expert import deepep
from nemohybrid.parallel.world import ROOM_ON_GPUS, room_on
from nemohybrid.train import step
from nemohybrid.train.balance import LoadBalance
from nemohybrid.train.build import build_model
from nemohybrid.train.evaluation import score_batches
from nemohybrid.train.finite import first_bad_tensor
from nemohybrid.train.parity import share_of, synthetic_batch
from nemohybrid.train.step import compute_gradients

TP2_EP2 = Layout(tensor=2, sequence=True, expert=2)


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(layout, action)`: action(context) on its ranks -> what each returned, as JSON knows it, in rank order."""

    def run(layout: Layout, action) -> list:
        folder = tmp_path / f"world{len(list(tmp_path.iterdir()))}"
        folder.mkdir()

        def member(rank: int) -> None:
            found = action(layout.of_this_rank())
            (tmp_path / f"{folder.name}.{rank}").write_text(json.dumps(found))

        failures = run_world(layout.ranks, member, folder)
        assert not failures, f"{failures[0].name}:\n{failures[0].read_text()}"
        return [json.loads((tmp_path / f"{folder.name}.{rank}").read_text()) for rank in range(layout.ranks)]

    return run


def test_tokens_that_ranks_share_travel_without_being_gathered(on_ranks):
    """Beside the exchange nothing is sent, forward or backward: each rank dispatches its own run of the tokens."""
    config = run_config("tied")  # whose experts have no shared one, which would gather
    assert config.model.shared_expert_ffn_hidden_size == 0

    def sends(context) -> list:
        config.model.router = replace(config.model.router, aux_loss="none")
        model, _ = build_model(TP2_EP2.configured(config), context)
        seq = SequenceContext(2, 16)
        seq.ranks = model.tensor_ranks(seq)
        x = torch.randn(seq.tokens // 2, config.model.hidden_size, requires_grad=True)
        with Traffic(context) as traffic:
            model.layers[2](x, seq).sum().backward()
        return sorted({one.kind for one in traffic.take()})

    assert on_ranks(TP2_EP2, sends) == [["all_to_all"]] * 2


@pytest.mark.parametrize(
    "layout", [Layout(data=2, expert=2, room=1.0), Layout(data=2, shard=2, expert=2, room=1.0)], ids=str
)
def test_a_step_that_was_short_of_room_is_computed_again_and_counts_once(layout, on_ranks):
    """Losses, gradients and loads are those of exact exchanges; the next step has the room."""
    base = run_config("every_option")

    def steps(of: Layout):
        def action(context) -> list:
            config, found, attempts = of.configured(base), [], []
            real = step.Attempts.was_short
            model, shared = build_model(config, context)
            balance = LoadBalance(model, context)

            def counted(*args) -> bool:
                attempts.append(real(*args))
                return attempts[-1]

            step.Attempts.was_short = counted
            for number in range(2):
                batch = share_of(synthetic_batch(config, number), context)
                losses = compute_gradients(model, batch, 1, context, shared)
                balance.collect()
                squares = sum(p.grad.square().sum().item() for p in shared.parameters.values() if p.grad is not None)
                found.append([losses.tolist(), squares, balance.loads.tolist()])
                for parameter in shared.parameters.values():
                    parameter.grad = None
            return [found, attempts]

        return action

    exact = replace(layout, room=None)
    limited, wanted = on_ranks(layout, steps(layout)), on_ranks(exact, steps(exact))
    for (got, attempts), (expected, never) in zip(limited, wanted, strict=True):
        assert attempts[0], "the first attempt should have been short of room"
        assert not any(never)
        assert attempts.count(False) == 2, "every step counts once"
        for mine, theirs in zip(got, expected, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-6)
            assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
            assert mine[2] == theirs[2], "a discarded attempt must not be counted"


def test_ranks_with_different_numbers_of_rows_are_scored_exactly(on_ranks):
    """Slots want equal numbers of tokens on all ranks; an evaluation has what is left of the text."""
    config = run_config("every_option")
    layout = Layout(data=2, expert=2, room=1.0)

    def score(rows: int, context: ParallelContext, data: int) -> list[float]:
        model, _ = build_model(layout.configured(config) if context.world_size > 1 else config, context)
        shaped = replace(config, train=replace(config.train, global_batch=2 * rows))
        seen = replace(ParallelContext.single(), data=replace(context.data, size=2, rank=data))
        with torch.no_grad():
            return score_batches(model, [share_of(synthetic_batch(shaped, 0), seen)], context).tolist()

    got = on_ranks(layout, lambda context: score(1 + 2 * context.data.rank, context, context.data.rank))
    for data, totals in enumerate(got):
        assert totals == pytest.approx(score(1 + 2 * data, ParallelContext.single(), data), rel=1e-5)


def test_gpus_limit_the_room_and_cpus_send_what_there_is(on_ranks):
    assert on_ranks(Layout(data=2, expert=2), lambda context: context.experts.room) == [0.0, 0.0]
    assert ROOM_ON_GPUS >= 1


def test_where_experts_lie_as_all_else_does_there_is_no_second_grid():
    assert not Axes(tensor=4).folds
    assert not Axes(tensor=4, expert_tensor=4).folds
    assert Axes(tensor=4, expert_tensor=1).folds
    assert Axes(expert=2).folds
    assert ParallelContext.imaginary(Axes(tensor=2)).experts is None


def test_rooms_and_dispatchers_on_gpus(monkeypatch):
    """DeepEP has no room; what it cannot send goes the other way, which has."""
    gpu, block = torch.device("cuda"), Group(2, 0, object())  # pyright: ignore[reportArgumentType]
    assert room_on(gpu, Axes(expert=2)) == ROOM_ON_GPUS
    assert room_on(gpu, Axes(expert=2, room=0.0)) == room_on(gpu, Axes(expert=2, dispatcher="deepep")) == 0
    assert room_on(torch.device("cpu"), Axes(expert=2)) == 0
    monkeypatch.setattr(expert, "_may_use_deepep", lambda placement: True)
    monkeypatch.setattr(deepep, "load", lambda: fake_deep_ep)
    chosen = expert.choose(expert.Placement(8, block), "auto", ROOM_ON_GPUS)
    assert isinstance(chosen, deepep.Fastest)
    assert isinstance(chosen.otherwise, expert.Slots)
    chosen.grow()
    assert chosen.otherwise.room == 2 * ROOM_ON_GPUS
    assert isinstance(expert.choose(expert.Placement(8, block), "deepep", 0.0), expert.DeepEP)


def test_experts_of_a_repeated_block_add_their_gradients_in_fp32(on_ranks):
    """In a bf16 model as well: they are used several times in a pass, so that FSDP must not send them as one cast."""
    base = run_config("every_option")
    base.model.dtype = "bfloat16"

    def gradients(layout: Layout):
        def action(context) -> dict:
            config = layout.configured(base)
            model, shared = build_model(config, context)
            compute_gradients(model, share_of(synthetic_batch(config, 0), context), 1, context, shared)
            names = [name for name in shared.parameters if name.startswith("mtp.") and ".experts." in name]
            return {name: shared.parameters[name].grad.tolist() for name in names}

        return on_ranks(layout, action)

    replicated = gradients(Layout(data=2, expert=2))
    cut = gradients(Layout(data=2, shard=2, expert=2))
    for mine, theirs in zip(cut, replicated, strict=True):
        assert len(mine) == 2
        for name, gradient in mine.items():
            torch.testing.assert_close(torch.tensor(gradient), torch.tensor(theirs[name]), rtol=0, atol=1e-7)


def test_a_repeated_step_draws_the_same_and_is_seen_once(on_ranks):
    """What a mixer of the user's own draws, and what is measured of the outputs, does not depend on the room."""
    base = run_config("every_option")

    def measured(layout: Layout):
        def action(context) -> list:
            config = layout.configured(base)
            model, shared = build_model(config, context)
            drop = model.layers[2].mixer.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.5))
            norms = OutputNorms(model)
            torch.manual_seed(context.data.rank)
            losses = []
            for number in range(2):
                norms.attach()
                batch = share_of(synthetic_batch(config, number), context)
                losses.append(compute_gradients(model, batch, 1, context, shared).tolist())
            drop.remove()
            found = norms.read(context.data)
            assert not model.before_repeat
            return [losses, found, model.repeats]

        return on_ranks(layout, action)

    limited, exact = measured(Layout(data=2, expert=2, room=1.0)), measured(Layout(data=2, expert=2))
    for mine, theirs in zip(limited, exact, strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2] > 0
        assert theirs[2] == 0


def test_a_step_without_numbers_does_not_grow_the_room(on_ranks):
    """NaN scores send every token to the same experts: the step must end with the message about it, not out of memory."""
    config = Layout(data=2, expert=2, room=1.5).configured(run_config("every_option"))

    def spoil(context) -> list:
        model, shared = build_model(config, context)
        compute_gradients(model, share_of(synthetic_batch(config, 0), context), 1, context, shared)
        before = model.layers[3].mixer.dispatcher.room
        with torch.no_grad():
            model.layers[0].norm.weight.fill_(torch.nan)
        compute_gradients(model, share_of(synthetic_batch(config, 1), context), 1, context, shared)
        return [before, model.layers[3].mixer.dispatcher.room]

    for before, after in on_ranks(Layout(data=2, expert=2, room=1.5), spoil):
        assert before == after


def test_the_first_bad_tensor_is_the_first_in_time_and_not_of_the_first_rank(on_ranks):
    """A weight of an expert on the last rank spoils outputs everywhere before anybody looks at that rank."""
    config = Layout(pipeline=2, data=2, expert=2).configured(run_config("every_option"))

    def spoil(context) -> str:
        model, _ = build_model(config, context)
        if context.rank == 3:
            with torch.no_grad():
                model.layers.get_submodule("3").mixer.experts.up[0, 0, 0] = torch.inf
        return first_bad_tensor(model, share_of(synthetic_batch(config, 0), context), 1, context)

    said = on_ranks(Layout(pipeline=2, data=2, expert=2), spoil)
    assert set(said) == {"weight layers.3.mixer.experts.up, already before the step, on rank 3"}
