"""`nemohybrid plan layout --gpus N OVERRIDE...`: what a rank would keep, send and wait for on so many GPUs."""

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from nemohybrid.cli.arguments import whole_number, without_files
from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.plan.pipeline import summary

if TYPE_CHECKING:
    from nemohybrid.plan.layout import LayoutPlan

GIB = 2**30

DESCRIPTION = """Check a layout for so many GPUs, and count what it costs, without any: every rule, the memory of the
fullest rank, the bytes that a rank sends in a step, and how long the ranks of a pipeline wait.

Overrides are those of `train`. How to choose: docs/parallelism.md."""
EXAMPLES = """examples:
  nemohybrid plan layout --gpus 64 model=nemotron_h_56b parallel.tensor=8 data.sequence_length=8192 \\
      train.global_batch=768 train.microbatch=1 train.recompute=layer
  nemohybrid plan layout --gpus 256 experiment=nemotron3_super_long train.recompute=layer train.microbatch=1"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """To those of `nemohybrid plan`."""
    p = commands.add_parser(
        "layout",
        help="rules, memory and bytes of a layout on many GPUs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="model, parallel, train, data.sequence_length")
    p.add_argument("--gpus", type=whole_number, required=True, help="ranks of the whole run")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels run (default cuda)")
    p.set_defaults(run=layout)


def layout(args: argparse.Namespace) -> int:
    """Print what the layout comes to. Raises ConfigError with every broken rule."""
    from nemohybrid.plan.layout import plan_layout  # torch takes seconds

    config = load_config(without_files(args.overrides), args.gpus)
    plan = plan_layout(config, args.gpus, args.device)
    print("\n".join([_step(config, args.gpus, plan), "", *_memory(config, plan), "", *_sent(plan), *_waits(plan)]))
    return 0


def _step(config: RunConfig, gpus: int, plan: "LayoutPlan") -> str:
    rows, each = f"{plan.rows} data rank{'s' * (plan.rows > 1)}", plan.microbatches
    batch, length = config.train.global_batch, config.data.sequence_length
    return (
        f"{config.model.name} on {gpus} ranks: a step is {batch} x {length:,} tokens, "
        f"{each} microbatch{'es' * (each > 1)} on each of {rows}"
    )


def _memory(config: RunConfig, plan: "LayoutPlan") -> list[str]:
    where = f", on pipeline rank {plan.stage}" if config.parallel.pipeline > 1 else ""
    return [f"the fullest rank keeps{where}, by count:", plan.memory.table()]


def _sent(plan: "LayoutPlan") -> list[str]:
    """By purpose, all kinds of collectives together; what is less than a hundredth of a GiB in the sum alone."""
    if plan.sent is None:
        return ["what a rank sends is not counted: a pipeline, or experts on ranks of their own"]
    sizes = Counter[tuple[str, str]]()
    for row in plan.sent:
        sizes[row.what, row.group] += round(row.sent)
    rows = [(f"{what}, {group} ranks", size) for (what, group), size in sizes.items() if size >= GIB / 100]
    lines = [f"  {name:38}{size / GIB:>10.2f} GiB" for name, size in [*rows, ("total", plan.bytes_sent or 0)]]
    return ["a rank sends in a step, by count:", *lines]


def _waits(plan: "LayoutPlan") -> list[str]:
    return [] if plan.pipeline is None else [summary(plan.pipeline)]
