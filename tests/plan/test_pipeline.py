"""Simulated steps take what the formulas say; activations are those that real passes keep; the strip says both."""

import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.parallel.schedule import BACKWARD, FORWARD, in_flight, inputs, legal_microbatches, orders
from nemohybrid.pattern import PatternError
from nemohybrid.plan.cost import Costs, Time, modelled
from nemohybrid.plan.pipeline import describe, microbatches_of, peak, peak_activations, plan_pipeline, strip
from nemohybrid.plan.timeline import simulate


def configured(*words: str) -> RunConfig:
    return load_model_config(["model=tiny_latent_mtp", "data.sequence_length=64", "train.microbatch=1", *words])


# --- The timeline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 4), (4, 9), (8, 32)])
def test_equal_stages_wait_as_long_as_published(schedule, ranks, microbatches):
    """Both: (p - 1) / (m + p - 1) of the step (arXiv 2104.04473, section 2.2.1)."""
    timeline = simulate(orders(schedule, ranks, ranks, microbatches), [Time(1.0, 2.0)] * ranks)
    assert timeline.makespan == 3.0 * (microbatches + ranks - 1)
    assert timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert timeline.ideal == 3.0 * microbatches


@pytest.mark.parametrize(("ranks", "local", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_interleaving_divides_the_wait_by_the_stages_of_a_rank(ranks, local, microbatches):
    """The same, section 2.2.2."""
    plan = orders("interleaved", ranks, local * ranks, microbatches)
    timeline = simulate(plan, [Time(1.0, 2.0)] * (local * ranks))
    assert timeline.makespan == 3.0 * (local * microbatches + ranks - 1)


@pytest.mark.parametrize("case", [("1f1b", 3, 3, 5), ("gpipe", 2, 4, 3), ("interleaved", 3, 6, 6)], ids=str)
def test_nothing_runs_twice_at_once_or_before_its_input(case):
    times = [Time(1.0 + stage, 3.0 - 0.3 * stage) for stage in range(case[2])]
    timeline = simulate(orders(*case), times, transfer=0.25)
    ends = {span.action: span.end for rank in timeline.spans for span in rank}
    for rank in timeline.spans:
        assert all(one.end <= other.start for one, other in pairwise(rank))
        for span in rank:
            needed = [ends[n] + 0.25 * (n.stage != span.action.stage) for n in inputs(span.action, case[2] - 1)]
            assert span.start >= max(needed, default=0.0)
    assert timeline.makespan > simulate(orders(*case), times).makespan


def test_the_slowest_stage_sets_the_pace():
    times = [Time(1, 2), Time(2, 4), Time(1, 2)]
    timeline = simulate(orders("1f1b", 3, 3, 50), times)
    assert timeline.makespan == pytest.approx(50 * 6 + 2 * 3, abs=3)
    assert timeline.idle[1] < 0.03 < 0.45 < timeline.idle[0]


def test_one_rank_never_waits():
    timeline = simulate(orders("interleaved", 1, 2, 2), [Time(1, 2), Time(3, 4)], transfer=9.0)
    assert (timeline.makespan, timeline.idle) == (20.0, (0.0,))


# --- The plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_without_cuts_says_what_cutting_by_cost_is_worth():
    config = load_model_config(["experiment=nemotron3_super", "parallel.pipeline=4"])
    plan = plan_pipeline(config, 16)
    assert (plan.schedule, plan.ranks, len(plan.times)) == ("1f1b", 4, 4)
    assert plan.gain is not None
    assert plan.gain > 0.2
    assert sum(plan.share_of(rank) for rank in range(4)) == pytest.approx(1)


def test_cuts_by_hand_are_planned_as_they_are():
    config = configured('model.pattern="|MM|**/*E"', "parallel.pipeline=3", "parallel.schedule=gpipe")
    plan = plan_pipeline(config, 2)
    assert (plan.schedule, plan.pattern.segments) == ("gpipe", ("", "MM", "**"))
    costs = modelled(config)
    assert plan.times[0] == costs.embedding
    assert plan.times[2] == costs.layers["*"] * 2 + costs.head + costs.mtp
    more = plan_pipeline(configured('model.pattern="|M|"', "parallel.pipeline=3"), 2)
    assert more.gain is None, "one layer cannot be cut into three equal counts"


def test_other_costs_cut_elsewhere():
    config = configured('model.pattern="MMMM****"', "parallel.pipeline=2")
    heavy = Costs({"M": Time(1, 1), "*": Time(100, 100)})
    assert plan_pipeline(config, 4, heavy).pattern.segments == ("MMMM**", "**")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["parallel.pipeline=4", "parallel.virtual_pipeline=2"], ConfigError, "Nearest legal: 8, 10"),
        (['model.pattern="M|M|M"', "parallel.pipeline=2"], PatternError, "Legal numbers of stages: 1, 3"),
        (["parallel.pipeline=50"], PatternError, "cannot be cut into 50 segments"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(words, error, message):
    with pytest.raises(error, match=message):
        plan_pipeline(configured('model.pattern="(M*)x6"', *words), 9)


def test_microbatches_of_a_step():
    config = configured("train.global_batch=64", "train.microbatch=2")
    assert (microbatches_of(config, 1), microbatches_of(config, 8)) == (32, 4)


def test_the_strip_has_a_line_a_rank_and_says_what_the_cut_is_worth():
    config = configured('model.pattern="MMMM****/*E/*E"', "parallel.pipeline=2", "parallel.virtual_pipeline=2")
    lines = describe(config, 4)
    plan = plan_pipeline(config, 4)
    assert len(lines) == 3
    first = " ... ".join(segment.symbols for segment in plan.segments[0])
    assert lines[0].startswith(f"stage 0 | {first}")
    assert "layers, embedding, " in lines[0] and "of the work, idle " in lines[0]  # noqa: PT018
    assert "head and 2 MTP" in lines[1]
    assert lines[2].startswith("interleaved, 2 stages a rank, 4 microbatches: ranks wait ")
    assert "than with equal layer counts (modelled)" in lines[2]
    assert lines == strip(plan)


def test_the_strip_of_one_rank_promises_no_gain():
    assert describe(configured("parallel.data=2", "train.global_batch=8"))[-1] == (
        "1f1b, 4 microbatches: ranks wait 0.0 % of the step (modelled)"
    )


def test_the_page_shows_what_its_command_prints():
    plan = plan_pipeline(load_model_config(["experiment=nemotron3_nano_30b", "parallel.pipeline=4"]), 16)
    page = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert "\n".join(strip(plan)) in page, "run the command of docs/pipeline.md again"


# --- Activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_the_peak_of_equal_stages_is_the_number_in_flight(schedule):
    for ranks, local, microbatches in [(2, 1, 5), (4, 1, 2), (2, 2, 4), (4, 3, 8)]:
        if (schedule == "1f1b" and local > 1) or not legal_microbatches(ranks, microbatches):
            continue
        stages = ranks * local
        for rank, order in enumerate(orders(schedule, ranks, stages, microbatches)):
            assert peak(order, [7] * stages) == 7 * in_flight(schedule, rank, ranks, stages, microbatches)


class Ledger:
    """Bytes that autograd keeps now and kept at most, each storage once, parameters left out."""

    def __init__(self, model: HybridModel) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.uses: Counter[int] = Counter()
        self.live = self.most = 0

    def pack(self, tensor: Tensor) -> "Box":
        box, storage = Box(tensor), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.parameters:
            self.live += 0 if self.uses[key] else size
            self.uses[key] += 1
            self.most = max(self.most, self.live)
            weakref.finalize(box, self.release, key, size)
        return box

    def release(self, key: int, size: int) -> None:
        self.uses[key] -= 1
        self.live -= 0 if self.uses[key] else size


class Box:
    """What autograd holds in the place of a tensor: it dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def counted_peaks(config: RunConfig, microbatches: int) -> list[int]:
    """Really run a step, stage by stage in the order of the schedule -> the most each rank kept."""
    plan = plan_pipeline(config, microbatches)
    model = HybridModel.create(config.model)
    ledgers = [Ledger(model) for _ in range(plan.ranks)]
    runner = Passes(model, config, plan.pattern.segments)
    waiting = [list(order) for order in orders(plan.schedule, plan.ranks, len(plan.times), microbatches)]
    while any(waiting):
        for ledger, order in zip(ledgers, waiting, strict=True):
            if order and runner.is_ready(*order[0]):
                with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda box: box.tensor):
                    runner.run(*order.pop(0))
    assert all(ledger.live == 0 for ledger in ledgers), "a step leaves nothing"
    return [ledger.most for ledger in ledgers]


class Passes:
    """Stages of a model in one process."""

    def __init__(self, model: HybridModel, config: RunConfig, segments: tuple[str, ...]) -> None:
        self.model, self.ends = model, [sum(map(len, segments[: s + 1])) for s in range(len(segments))]
        self.seq = SequenceContext(config.train.microbatch or 1, config.data.sequence_length)
        self.seq.ranks = model.tensor_ranks(self.seq)
        self.ids = torch.randint(config.model.vocab_size or 1, (self.seq.batch, self.seq.length))
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.gradients: dict[tuple[int, int], Tensor | None] = {}

    def is_ready(self, kind: str, stage: int, microbatch: int) -> bool:
        if kind == FORWARD:
            return stage == 0 or (stage - 1, microbatch) in self.outputs
        return stage == len(self.ends) - 1 or (stage, microbatch) in self.gradients

    def run(self, kind: str, stage: int, microbatch: int) -> None:
        (self.forward if kind == FORWARD else self.backward)(stage, microbatch)

    def forward(self, stage: int, microbatch: int) -> None:
        if stage == 0:
            assert self.model.embedding is not None
            x = self.model.embedding.embed(self.ids, self.model.dtype, self.seq)
        else:
            x = self.outputs[stage - 1, microbatch].detach().requires_grad_()
            self.inputs[stage, microbatch] = x
        first = self.ends[stage - 1] if stage else 0
        for layer in list(self.model.layers.children())[first : self.ends[stage]]:
            x = layer(x, self.seq)
        self.outputs[stage, microbatch] = self.loss(x) if stage == len(self.ends) - 1 else x

    def loss(self, x: Tensor) -> Tensor:
        assert self.model.final_norm is not None
        hidden = self.model.final_norm(x)
        heads = [hidden, *self.model.mtp_hidden_states(hidden, self.ids, self.seq)]
        losses = [self.model.output.cross_entropy(h, self.ids.flatten(), self.seq).sum() for h in heads]
        return torch.stack(losses).sum()

    def backward(self, stage: int, microbatch: int) -> None:
        self.outputs.pop((stage, microbatch)).backward(self.gradients.pop((stage, microbatch), None))
        if stage:
            self.gradients[stage - 1, microbatch] = self.inputs.pop((stage, microbatch)).grad


CASES = {
    "1f1b, two stages": (4, ['model.pattern="MEM*-ME-"', "parallel.pipeline=2"]),
    "1f1b, four stages, MTP": (6, ['model.pattern="MEM*-ME-/*E/*E"', "parallel.pipeline=4"]),
    "gpipe": (3, ['model.pattern="MEM*-ME-"', "parallel.pipeline=2", "parallel.schedule=gpipe"]),
    "interleaved": (4, ['model.pattern="MEM*-ME-"', "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "bf16": (4, ['model.pattern="MEM*-ME-"', "parallel.pipeline=2", "model.dtype=bfloat16"]),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_passes_really_keep(case):
    """The chunk is given, as the best one is another on the CPU than on the meta device, where layers are counted."""
    microbatches, words = CASES[case]
    sizes = ["model.chunk_size=32", "train.microbatch=2", "data.sequence_length=128", "model.dtype=float32"]
    config = configured(*sizes, *words)
    planned = peak_activations(config, plan_pipeline(config, microbatches))
    assert list(planned) == pytest.approx(counted_peaks(config, microbatches), rel=0.03)


def test_with_recomputation_a_layer_in_flight_keeps_its_input():
    words = ['model.pattern="MMMM|MMMM"', "parallel.pipeline=2", "data.sequence_length=512"]
    plain, again = (configured(*words, f"train.recompute={how}") for how in ("none", "layer"))
    whole, inputs_only = (peak_activations(config, plan_pipeline(config, 8)) for config in (plain, again))
    stream = 512 * plain.model.hidden_size * 2
    layer = whole[0] // 8  # two microbatches in flight, four layers
    assert inputs_only[0] == 2 * 4 * stream + layer
    assert inputs_only[0] < whole[0] / 3


def test_deeper_stages_keep_less():
    config = load_model_config(["experiment=nemotron3_nano_30b", "parallel.pipeline=4"])
    kept = peak_activations(config, plan_pipeline(config, 16))
    assert sorted(kept, reverse=True) == list(kept)
    few = peak_activations(config, plan_pipeline(config, 1))
    assert kept[0] == 4 * few[0]


def test_a_plan_is_a_value():
    config = configured("parallel.pipeline=2")
    assert plan_pipeline(config, 4) == plan_pipeline(config, 4)
    assert replace(plan_pipeline(config, 4), even=None).gain is None
    assert {span.action.kind for span in plan_pipeline(config, 4).timeline.spans[0]} == {FORWARD, BACKWARD}
