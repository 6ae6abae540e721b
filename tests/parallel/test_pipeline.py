"""What goes wrong silently in pipelines, beside what the proof of every layout sees: shapes, evaluation, empty stages, memory."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor
from forked import run_world
from layouts import Layout, compare, run_config
from torch import nn
from traffic import Traffic

from nemohybrid.errors import ConfigError
from nemohybrid.parallel import pipeline as runner
from nemohybrid.parallel.context import Axes, ParallelContext
from nemohybrid.parallel.layout import layout_of
from nemohybrid.parallel.pipeline import Pipeline
from nemohybrid.parallel.world import divide
from nemohybrid.train.build import build_model
from nemohybrid.train.evaluation import score_batches
from nemohybrid.train.finite import first_bad_tensor
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.parity import share_of, synthetic_batch
from nemohybrid.train.step import compute_gradients

PP2, PP4 = Layout(pipeline=2), Layout(pipeline=4)
TOLERANCE = 1e-5


def ranks(layout: Layout, action, tmp_path) -> None:
    """action(context) on the ranks of a layout; their failures fail the test."""
    folder = tmp_path / f"world{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    failures = run_world(layout.ranks, lambda rank: action(layout.of_this_rank()), folder)
    assert not failures, f"{failures[0].name}:\n{failures[0].read_text()}"


def gradients_of(config, context, shapes) -> list[dict[str, torch.Tensor]]:
    """Of steps with other batches each, (length, rows, microbatch), after one another with the same model."""
    model, shared = build_model(config, context)
    found = []
    for length, rows, microbatch in shapes:
        config = replace(config, train=replace(config.train, global_batch=rows))
        config = replace(config, data=replace(config.data, sequence_length=length))
        batch = share_of(synthetic_batch(config, len(found)), context)
        compute_gradients(model, batch, microbatch, context, shared)
        found.append({name: p.grad.clone() for name, p in shared.parameters.items() if p.grad is not None})
        for parameter in shared.parameters.values():
            parameter.grad = None
    return found


@pytest.mark.parametrize("layout", [PP2, Layout(pipeline=2, virtual=2), Layout(pipeline=2, schedule="gpipe")], ids=str)
def test_other_lengths_and_numbers_of_microbatches_in_the_same_run(layout, tmp_path):
    """torch.distributed.pipelining keeps the buffers of the first step: another shape there is an error or a silent fault."""
    shapes = [(16, 4, 1), (8, 6, 3), (24, 2, 1), (16, 4, 2)]
    config = run_config("every_option")
    wanted = gradients_of(config, ParallelContext.single(), shapes)

    def train(context) -> None:
        for step, got in enumerate(gradients_of(layout.configured(config), context, shapes)):
            assert got, "a stage without a gradient"
            for name, gradient in got.items():
                expected = wanted[step][name]
                off = (gradient - expected).abs().max() / expected.abs().max()
                assert off < TOLERANCE, f"{name} of step {step}: off by {off:.1e}"

    ranks(layout, train, tmp_path)


@pytest.mark.parametrize(
    "layout", [PP4, Layout(pipeline=4, data=2, shard=2), Layout(pipeline=2, virtual=2, data=2, expert=2)], ids=str
)
def test_stages_without_a_layer_train_as_one_rank_does(layout):
    comparison = compare(layout, "with_empty_stages")
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))


def test_a_rank_without_any_parameter_takes_steps():
    model, shared = build_model(PP4.configured(run_config("with_empty_stages")), imaginary_stage(2))
    assert not list(model.parameters())
    optimizer = build_optimizer(shared.parameters.values(), run_config().optim)
    optimizer.step()


def imaginary_stage(rank: int) -> ParallelContext:
    context = ParallelContext.imaginary(Axes(pipeline=4), rank)
    return replace(context, device=torch.device("cpu"))


def test_the_ends_hold_the_embedding_and_the_middle_does_not():
    """Tied, or read by MTP blocks: on both ends; else where it is used."""
    names = {}
    for name in ("every_option", "tied", "with_empty_stages"):
        for rank in (0, 1, 3):
            model, _ = build_model(PP4.configured(run_config(name)), imaginary_stage(rank))
            ends = {key: layout_of(p).end for key, p in model.named_parameters() if layout_of(p).end is not None}
            names[name, rank] = ends
    assert names["every_option", 0] == {"embedding.weight": 0}
    assert names["every_option", 3] == {"embedding.weight": 1}
    assert names["tied", 3] == {"embedding.weight": 1}
    assert names["tied", 1] == names["every_option", 1] == {}


@pytest.mark.parametrize("model", ["tied", "tied_by_sequence", "latent"])
@pytest.mark.parametrize("layout", [PP2, Layout(pipeline=2, virtual=2)], ids=str)
def test_tied_vocabularies_and_drafts_across_stages(layout, model):
    """`tied` balances experts over the whole batch: with one data rank the loads are those of one rank."""
    comparison = compare(layout, model, packed=False)
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))


@pytest.mark.parametrize(
    "layout",
    [
        PP2,
        Layout(pipeline=2, virtual=2),
        Layout(pipeline=2, data=2, shard=2),
        Layout(pipeline=2, tensor=2, sequence=True),
    ],
    ids=str,
)
def test_scores_of_a_pipeline_are_those_of_one_rank(layout, tmp_path):
    """Batches of different sizes, more than ranks; the drafts count too. Nothing of a gradient is left."""
    config = run_config("every_option")

    def batches(context):
        sizes = [(16, 4), (16, 2), (8, 4)]
        for step, (length, rows) in enumerate(sizes):
            shaped = replace(config, train=replace(config.train, global_batch=rows * context.data.size))
            shaped = replace(shaped, data=replace(config.data, sequence_length=length))
            yield share_of(synthetic_batch(shaped, step), context)

    def score(context):
        model, shared = build_model(layout.configured(config) if context.world_size > 1 else config, context)
        with torch.no_grad():
            totals = score_batches(model, list(batches(context)), context)
        shared.release()
        assert all(p.grad is None for p in model.parameters())
        return totals

    def write(context) -> None:
        (tmp_path / f"score{context.rank}").write_text(json.dumps([context.data.rank, *score(context).tolist()]))

    ranks(layout, write, tmp_path)
    whole = Counter()
    for file in tmp_path.glob("score*"):
        data, *totals = json.loads(file.read_text())
        if any(totals):
            whole[data] = totals
    for data, totals in whole.items():
        alone = ParallelContext.single()
        seen = replace(alone, data=replace(alone.data, size=layout.data, rank=data))
        assert totals == pytest.approx(score(seen).tolist(), rel=1e-5)
    assert len(whole) == layout.data


@pytest.mark.parametrize("mode", ["full_shard", "shard_grad"])
def test_full_shard_gathers_again_for_every_microbatch_and_shard_grad_does_not(mode, tmp_path):
    """Why `auto` means shard_grad in a pipeline. Of the two layers of a stage, forward and backward; the rest once."""

    def count(context) -> None:
        config = Layout(pipeline=2, data=2, shard=2, mode=mode).configured(run_config("every_option", rows=8))
        model, shared = build_model(config, context)
        with Traffic(context) as traffic:
            compute_gradients(model, share_of(synthetic_batch(config, 0), context), 1, context, shared)
        gathers = sum(one.kind == "all_gather" for one in traffic.take())
        layers = len(model.layers) + sum(len(block.layers) for block in model.mtp)
        microbatches = 4
        # the repeated MTP block runs twice a pass: what is gathered for it depends on the prefetch
        if context.pipeline.rank == 0:
            assert gathers == 1 + layers * (2 * microbatches if mode == "full_shard" else 1), gathers
        else:
            assert (gathers > 1 + 2 * layers) == (mode == "full_shard"), gathers

    ranks(Layout(pipeline=2, data=2, shard=2), count, tmp_path)


def test_shard_grad_gathers_once_a_step_also_with_several_stages_a_rank(tmp_path):
    """FSDP ends every backward pass with all modules: those of other stages must keep what they have gathered."""
    layout = Layout(pipeline=2, virtual=2, data=2, shard=2, mode="shard_grad")

    def count(context) -> None:
        config = layout.configured(run_config("latent", rows=8))
        model, shared = build_model(config, context)
        for step in range(2):
            with Traffic(context) as traffic:
                compute_gradients(model, share_of(synthetic_batch(config, step), context), 1, context, shared)
            gathers = sum(one.kind == "all_gather" for one in traffic.take())
            layers = len(model.layers) + sum(len(block.layers) for block in model.mtp)
            assert gathers == 1 + layers, f"{gathers} gathers in step {step}"

    ranks(layout, count, tmp_path)


def test_data_ranks_of_a_pipeline_share_gradients_unless_something_else_is_said():
    from nemohybrid.config.ranks import data_mode

    config = run_config()
    assert data_mode(config.parallel) == "full_shard"
    assert data_mode(replace(config.parallel, pipeline=2)) == "shard_grad"
    assert data_mode(replace(config.parallel, pipeline=2, data_mode="full_shard")) == "full_shard"


def test_a_zero_bubble_schedule_is_not_on_offer():
    """With full shard it gives wrong gradients, and fused autograd functions repeat their backward pass under it."""
    with pytest.raises(ConfigError, match="gpipe, 1f1b, interleaved"):
        runner.orders("zero_bubble", 2, 2, 4)


@pytest.mark.parametrize(
    "name, moment, said",
    [
        ("layers.1", "output", "the output of layers.1 in microbatch 1 of 4 on rank 1"),
        ("layers.2", "gradient", "the gradient of layers.2."),
        ("final_norm", "output", "the output of final_norm in microbatch 1 of 4 on rank 1"),
    ],
)
def test_the_first_bad_tensor_is_that_of_the_first_stage_on_the_way(name, moment, said, tmp_path):
    """A later stage of the first rank comes after an earlier one of the last; gradients go the other way."""
    layout = Layout(pipeline=2, virtual=2)
    config = layout.configured(run_config("every_option"))

    def spoil(context) -> None:
        model, _ = build_model(config, context)
        module = dict(model.named_modules()).get(name)
        if module is not None and moment == "output":
            module.register_forward_hook(lambda _, __, out: out * torch.nan)
        elif module is not None:
            module.register_forward_hook(lambda _, __, out: out.register_hook(lambda g: g * torch.nan) and None)
        found = first_bad_tensor(model, share_of(synthetic_batch(config, 0), context), 1, context)
        assert found.startswith(said), found

    ranks(layout, spoil, tmp_path)


# --- The runner by itself, with toy stages and torch.distributed.pipelining as the other opinion ------------------------


def toy(stages: int) -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(stages)]


def losses_of(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum()


@pytest.mark.parametrize("schedule, stages", [("gpipe", 3), ("1f1b", 3), ("interleaved", 6)])
def test_gradients_are_those_of_torch_distributed_pipelining(schedule, stages, tmp_path):
    """Bit by bit: the same passes in the same order."""
    rows = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(0))

    def ours(group, rank: int) -> list[torch.Tensor]:
        modules = toy(stages)

        def forward(stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor:
            y = modules[stage](rows[microbatch] if x is None else x)
            return losses_of(y) if stage == stages - 1 else y

        line = Pipeline(group, group, stages, schedule, torch.device("cpu"), torch.float32)
        line.train(len(rows), lambda microbatch: (4, 6), forward)
        return [p.grad for stage in range(rank, stages, 3) for p in modules[stage].parameters()]

    def theirs(group, rank: int) -> list[torch.Tensor]:
        from torch.distributed import pipelining

        modules = toy(stages)
        own = [
            pipelining.PipelineStage(modules[s], s, stages, torch.device("cpu"), group=group.handle)
            for s in range(rank, stages, 3)
        ]
        kinds = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}
        kinds["interleaved"] = pipelining.ScheduleInterleaved1F1B
        only = own if schedule == "interleaved" else own[0]
        run = kinds[schedule](only, len(rows), loss_fn=lambda y, _: losses_of(y), scale_grads=False)
        given = [rows.flatten(0, 1)] if rank == 0 else []
        target = {"target": rows.flatten(0, 1)} if rank == 2 else {}
        run.step(*given, **target)
        return [p.grad for stage in range(rank, stages, 3) for p in modules[stage].parameters()]

    def both(rank: int) -> None:
        group = divide(torch.device("cpu"), Axes(pipeline=3)).pipeline
        for got, wanted in zip(ours(group, rank), theirs(group, rank), strict=True):
            assert torch.equal(got, wanted)

    (tmp_path / "world").mkdir()
    failures = run_world(3, both, tmp_path / "world")
    assert not failures, failures[0].read_text()


@pytest.mark.parametrize(
    "schedule, stages, most", [("gpipe", 2, [8, 8]), ("1f1b", 2, [2, 1]), ("interleaved", 4, [5, 3])]
)
def test_no_more_microbatches_wait_than_the_schedule_says(schedule, stages, most, tmp_path):
    """And no buffer is kept for a microbatch that is not there yet: torch's runtime has one for each from the start."""

    def count(rank: int) -> None:
        group = divide(torch.device("cpu"), Axes(pipeline=2)).pipeline
        modules, seen = toy(stages), []
        real = runner._Run.do_forward

        def watched(run, stage: int, microbatch: int) -> None:
            real(run, stage, microbatch)
            assert len(run.sent) <= runner.ON_THE_WAY, "what has arrived elsewhere is kept"
            seen.append((len(run.graphs), sum(x is not None for x in run.inputs.values())))

        runner._DO["forward"] = watched

        def forward(stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor:
            y = modules[stage](torch.ones(4, 6) if x is None else x)
            return losses_of(y) if stage == stages - 1 else y

        line = Pipeline(group, group, stages, schedule, torch.device("cpu"), torch.float32)
        line.train(8, lambda microbatch: (4, 6), forward)
        assert max(graphs for graphs, _ in seen) == most[rank]
        assert max(inputs for _, inputs in seen) <= most[rank] + 2

    (tmp_path / "world").mkdir()
    failures = run_world(2, count, tmp_path / "world")
    assert not failures, failures[0].read_text()


@pytest.mark.parametrize("wrong", [lambda y: y.bfloat16(), lambda y: y[:2]], ids=["dtype", "shape"])
def test_a_stage_that_hands_on_something_else_is_named_at_once(wrong, tmp_path):
    """Gloo would take a shorter message for a longer one, and leave the rest of the buffer as it was."""

    def run(rank: int) -> None:
        group = divide(torch.device("cpu"), Axes(pipeline=2)).pipeline
        modules = toy(2)

        def forward(stage: int, microbatch: int, x: torch.Tensor | None) -> torch.Tensor:
            y = modules[stage](torch.ones(4, 6) if x is None else x)
            return losses_of(y) if stage == 1 else wrong(y)

        line = Pipeline(group, group, 2, "1f1b", torch.device("cpu"), torch.float32)
        line.train(2, lambda microbatch: (4, 6), forward)

    (tmp_path / "world").mkdir()
    failures = {file.name: file.read_text() for file in run_world(2, run, tmp_path / "world")}
    assert "every layer must return what it was given in shape and dtype" in failures["failure0"]


@pytest.mark.parametrize("layout", [PP2, Layout(pipeline=2, data=2)], ids=str)
def test_what_goes_forward_has_a_group_of_its_own(layout, tmp_path):
    """NCCL does what one group is asked for one after the other; the pairs are the same."""

    def look(context) -> None:
        assert context.onward.handle is not context.pipeline.handle
        assert (context.onward.size, context.onward.rank) == (context.pipeline.size, context.pipeline.rank)
        assert context.stage.size == context.data.size == layout.data

    ranks(layout, look, tmp_path)
