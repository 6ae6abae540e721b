"""What `nemohybrid parity` says: what is compared, how far off it is, and what to do."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemohybrid.config.run_config import RunConfig

if TYPE_CHECKING:
    from nemohybrid.parallel.context import ParallelContext
    from nemohybrid.train.parity import Comparison


def introduction(config: RunConfig, context: "ParallelContext", steps: int) -> str:
    """Model, layout and work in one line."""
    from nemohybrid.train.run import described

    model, train = config.model, config.train
    return (
        f"parity: {model.name} ({model.pattern}) under {described(config, context)} against one rank, {steps} steps of "
        f"{train.global_batch} x {config.data.sequence_length} tokens, {model.dtype} on "
        f"{context.world_size} x {context.device.type}"
    )


def table(comparison: "Comparison", top: int) -> Iterator[str]:
    """Losses and norms side by side, and the tensors that are farthest off."""
    from nemohybrid.train.parity import off_by

    yield f"{'':28}{'layout':>12}{'one rank':>12}{'difference':>12}"
    for name, (got, wanted) in comparison.numbers.items():
        yield f"{name:28}{got:>12.6g}{wanted:>12.6g}{off_by(got, wanted):>12.1e}"
    yield f"{'error':>10}{'largest entry':>15}  gradients of step 1 and weights after the last; errors as shares"
    for one in comparison.worst()[:top]:
        yield f"{one.relative:>10.1e}{one.scale:>15.1e}  {one.name}"


def verdict(
    comparison: "Comparison", context: "ParallelContext", config: RunConfig, args: argparse.Namespace
) -> Iterator[str]:
    """One line where all is well; else the first faults and what to do."""
    worst, faults, tolerance = comparison.worst()[0].relative, comparison.faults(args.tolerance), args.tolerance
    compared = f"{len(comparison.tensors)} tensors compared, worst {worst:.1e}, tolerance {tolerance:.0e}"
    if not faults:
        yield f"{compared}: the layout equals one rank"
        return
    yield f"{compared}: the layout does NOT equal one rank, {len(faults)} fault{'s' * (len(faults) > 1)}:"
    yield from (f"  {fault}" for fault in faults[: args.top])
    yield from [f"  and {len(faults) - args.top} more; --top shows more of them"] if len(faults) > args.top else []
    yield "What to do:"
    yield from (f"  - {line}" for line in advice(context, config, worst, tolerance))


def advice(context: "ParallelContext", config: RunConfig, worst: float, tolerance: float) -> Iterator[str]:
    """What may be the reason, and how to find out."""
    model, data, tensor = config.model, context.data.size, context.tensor.size
    experts = "E" in model.pattern
    if experts and model.router.aux_loss == "global" and data > 1:
        yield "compare with model.router.aux_loss=sequence: with global, data ranks know other loads (docs/moe.md)"
    if model.dtype != "float32":
        others = ", and chooses among experts of nearly equal scores" if experts else ""
        yield f"compare with --dtype float32: where that passes, it is {model.dtype}, which rounds sums of parts{others}"
        return
    if tolerance < worst < 10 * tolerance:
        yield f"it may be rounding, as faults are mostly 1e-2 and more: compare with --tolerance {10 * tolerance:.0e}"
    smaller = [*["parallel.sequence=false"] * context.sequence, *["parallel.tensor=1"] * (tensor > 1)]
    smaller += ["parallel.data_mode=replicate"] if context.shard.size > 1 else []
    smaller += ["parallel.pipeline=1"] if context.pipeline.size > 1 else []
    smaller += ["parallel.expert=1 parallel.expert_tensor=null"] if context.experts is not None else []
    yield f"see which part it is: {', '.join([*smaller, 'fewer symbols in model.pattern'])}"
    yield "do not train with this layout before that is known; please report it with this output"
