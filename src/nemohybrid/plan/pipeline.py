"""A pipeline before it runs: how it is cut, when each rank works and waits, what it keeps. See docs/pipeline.md.

Left out of the time: all that is sent inside a stage (plan/communication.py counts it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemohybrid.config.ranks import schedule
from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.schedule import FORWARD, Action, orders
from nemohybrid.pattern import Pattern, Segment
from nemohybrid.plan.cost import Costs, Time, modelled
from nemohybrid.plan.cut import evenly, placed, stage_times
from nemohybrid.plan.timeline import Timeline, simulate
from nemohybrid.symbols import parse_pattern


@dataclass(frozen=True)
class PipelinePlan:
    """One step of a pipeline. pattern: with the "|" it is cut at; times: of a microbatch in each stage.

    even: seconds of the same step with equal layer counts; None where there are fewer layers than stages.
    """

    name: str
    schedule: str
    pattern: Pattern
    ranks: int
    microbatches: int
    times: tuple[Time, ...]
    timeline: Timeline
    even: float | None

    @property
    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """For each rank its segments, in the order in which a microbatch visits them."""
        return self.pattern.stage_layers(self.ranks)

    @property
    def gain(self) -> float | None:
        """How much faster a step is than with equal layer counts, e.g. 0.3: in the same time 30 % more steps."""
        return None if self.even is None else self.even / self.timeline.makespan - 1

    def time_of(self, rank: int) -> Time:
        """What a rank computes for one microbatch, in all its stages."""
        return sum(self.times[rank :: self.ranks], Time())

    def share_of(self, rank: int) -> float:
        """Its part of all that is computed."""
        return self.time_of(rank).both / sum(time.both for time in self.times)


def plan_pipeline(config: RunConfig, microbatches: int, costs: Costs | None = None) -> PipelinePlan:
    """Cut and simulate one step of `config` with so many microbatches on every data rank.

    costs: those of `modelled` on an H100 where None are given, by which also the run is cut. Raises ConfigError for
    what the schedule cannot run, and PatternError for what cannot be cut.
    """
    costs, ranks = costs or modelled(config), config.parallel.pipeline
    parsed = parse_pattern(config.model.pattern)
    whole = parsed.cut_at([parsed.num_layers])
    pattern = whole if ranks == 1 else placed(parsed, config, costs)
    pattern.check_stages(ranks)
    stages = len(pattern.segments)
    order = schedule(config.parallel, stages)
    even = evenly(whole, stages) if stages <= whole.num_layers else None

    def step(cut: Pattern) -> Timeline:
        return simulate(orders(order, ranks, stages, microbatches), stage_times(cut, costs), costs.transfer)

    return PipelinePlan(
        name=config.model.name,
        schedule=order,
        pattern=pattern,
        ranks=ranks,
        microbatches=microbatches,
        times=tuple(stage_times(pattern, costs)),
        timeline=step(pattern),
        even=step(even).makespan if even else None,
    )


def microbatches_of(config: RunConfig, data_ranks: int) -> int:
    """Of one data rank in a step. `train.microbatch` empty counts as 1: a pipeline wants many."""
    return max(1, config.train.global_batch // data_ranks // (config.train.microbatch or 1))


# --- In words ---------------------------------------------------------------------------------------------------------


def describe(config: RunConfig, microbatches: int | None = None) -> list[str]:
    """The strip that is shown before a pipeline is used: a line a rank, and one about the whole. See `strip`.

    microbatches: of a data rank in a step; None: those of `config` where `parallel.data` is a number, else of one data
    rank.
    """
    data = int(config.parallel.data) if config.parallel.data.isdecimal() else 1
    return strip(plan_pipeline(config, microbatches or microbatches_of(config, data)))


def strip(plan: PipelinePlan) -> list[str]:
    """E.g. `stage 0 | MEMEM*E | 7 layers, embedding, 24.1 % of the work, idle 3.2 %` for each rank, then a summary.

    Several segments of a rank are parted by " ... ": other ranks have what comes between.
    """
    texts = [" ... ".join(segment.symbols for segment in own) for own in plan.segments]
    width = max(map(len, texts))
    lines = [f"stage {rank} | {text:{width}} | {_about(plan, rank)}" for rank, text in enumerate(texts)]
    return [*lines, summary(plan)]


def _about(plan: PipelinePlan, rank: int) -> str:
    layers = sum(len(segment.symbols) for segment in plan.segments[rank])
    depth = plan.pattern.mtp_depth
    last = ["head" if not depth else f"head and {depth} MTP"] if rank == plan.ranks - 1 else []
    parts = [f"{layers} layer{'s' * (layers != 1)}", *(["embedding"] if rank == 0 else []), *last]
    return f"{', '.join(parts)}, {plan.share_of(rank):.1%} of the work, idle {plan.timeline.idle[rank]:.1%}".replace(
        "%", " %"
    )


def summary(plan: PipelinePlan) -> str:
    """Schedule, bubble, and what the cut is worth."""
    turns = f", {len(plan.segments[0])} stages a rank" if len(plan.segments[0]) > 1 else ""
    number = f"{plan.microbatches} microbatch{'es' * (plan.microbatches > 1)}"
    gain = "" if plan.gain is None or plan.ranks == 1 else f", {_compared(plan.gain)} equal layer counts"
    return (
        f"{plan.schedule}{turns}, {number}: ranks wait {100 * plan.timeline.bubble:.1f} % of the step{gain} (modelled)"
    )


def _compared(gain: float) -> str:
    return f"{100 * abs(gain):.1f} % {'faster' if gain >= 0 else 'slower'} than with"


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_activations(config: RunConfig, plan: PipelinePlan, device: str = "cpu") -> tuple[int, ...]:
    """Bytes a rank keeps for backward passes at most: of its stages, microbatches in flight times what one leaves, with the
    kernels of a `device` of this type.

    In flight are the microbatches whose forward pass is done and whose backward pass is not: with gpipe all, with 1f1b
    at most ranks - rank. A recomputed layer keeps its input alone, and at its turn one layer, or the head of a model
    with MTP, keeps what it would anyway. Not counted: what passes while gradients are computed, and buffers of
    transfers. May raise whatever a mixer of the user's own does on the meta device.
    """
    from nemohybrid.plan.kept import kept_by_microbatch  # torch takes seconds

    kept = kept_by_microbatch(config, config.train.microbatch or 1, device=device)
    recompute, depth = config.train.recompute == "layer", plan.pattern.mtp_depth
    layers = {symbol: kept.stream if recompute else size for symbol, size in kept.layers.items()}
    again = recompute and depth > 0
    head = 2 * kept.stream if again else kept.head  # what the final norm reads, and what it makes
    block = kept.combine + sum(layers[symbol] for symbol in plan.pattern.mtp) + head
    stages = [sum(layers[symbol] for symbol in segment) for segment in plan.pattern.segments]
    stages[-1] += head + depth * block
    order = orders(plan.schedule, plan.ranks, len(stages), plan.microbatches)
    peaks = [peak(own, stages) for own in order]
    if not recompute:
        return tuple(peaks)
    passing = [max((kept.layers[s] for segment in own for s in segment.symbols), default=0) for own in plan.segments]
    passing[-1] = max([passing[-1], *([kept.head] if again else []), *(kept.layers[s] for s in plan.pattern.mtp)])
    return tuple(size + most for size, most in zip(peaks, passing, strict=True))


def peak(order: Sequence[Action], sizes: Sequence[int]) -> int:
    """The most that a rank with this order keeps, when a pass through stage s keeps sizes[s] until it goes back."""
    live = most = 0
    for action in order:
        live += sizes[action.stage] if action.kind == FORWARD else -sizes[action.stage]
        most = max(most, live)
    return most
