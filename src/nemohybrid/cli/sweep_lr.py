"""`nemohybrid sweep-lr OVERRIDE...`: raise the learning rate until training breaks, with and without what should help."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemohybrid.cli.arguments import whole_number
from nemohybrid.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from nemohybrid.train.signals import StopSignals

EXAMPLE = """example, about a minute:
  nemohybrid sweep-lr model=tiny data=shakespeare data.sequence_length=64 schedule=constant schedule.warmup=10 \\
      --arms baseline qk_fc_norm --lrs 1e-2 1e-1 --seeds 1 --steps 50 --output runs/sweep

An arm is a name for some overrides. An arm of your own:  --arm mine model.dt_limit=[0,0.5] model.attention.softcap=20
Overrides of all arms come first. The same command goes on after an interruption; a finished cell is not run again.
"""


def main(argv: list[str]) -> int:
    """Run what is missing, then write the report; returns the exit status."""
    args = parser().parse_intermixed_args(argv)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("sweep-lr runs one small model after another in one process; start it without torchrun")
    from nemohybrid.train.signals import StopSignals

    with StopSignals() as signals:  # before the imports that take seconds
        return sweep(args, signals)


def parser() -> argparse.ArgumentParser:
    """The options of `nemohybrid sweep-lr`."""
    parser = argparse.ArgumentParser(
        prog="nemohybrid sweep-lr",
        description="Train every arm at every learning rate with every seed, and report which of them still learn.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLE,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="model, data, batch and schedule of all arms")
    parser.add_argument(
        "--arms", nargs="+", default=["baseline"], metavar="NAME", help="arms that come with nemohybrid"
    )
    parser.add_argument(
        "--arm", nargs="+", action="append", default=[], metavar="WORD", help="NAME OVERRIDE ...: one of your own"
    )
    parser.add_argument("--lrs", nargs="+", type=_rate, required=True, metavar="RATE", help="peak learning rates")
    parser.add_argument(
        "--seeds", type=whole_number, default=3, help="runs of each arm and rate: run.seed, run.seed + 1, ..."
    )
    parser.add_argument("--steps", type=whole_number, default=150, help="optimizer steps of a run")
    parser.add_argument("--measure-every", type=whole_number, default=10, help="steps between two looks at the outputs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records and the report")
    return parser


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate


def chosen_arms(
    names: Sequence[str], own: Sequence[Sequence[str]], known: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Name -> overrides of all arms asked for. Raises ConfigError for a name that is unknown or taken."""
    arms: dict[str, Sequence[str]] = {}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no arm {name!r}{did_you_mean(name, known) or '.'} Known: {', '.join(known)}")
        arms[name] = known[name]
    for name, *overrides in own:
        if name in known or name in arms or not name.replace("_", "").isalnum():
            raise ConfigError(f"--arm {name}: give it a name of its own, of letters, digits and _")
        arms[name] = overrides
    return arms


def sweep(args: argparse.Namespace, signals: "StopSignals") -> int:
    """Every cell that is missing, one after the other; the report is written whatever happens."""
    from nemohybrid.observe.lr_sweep import markdown, write_report
    from nemohybrid.train.lock import only_job_in
    from nemohybrid.train.lr_sweep import ARMS, Sweep, run_cells
    from nemohybrid.train.run import join
    from nemohybrid.train.signals import exit_status

    arms = chosen_arms(args.arms, args.arm, ARMS)
    plan = Sweep(args.overrides, arms, args.lrs, args.seeds, args.steps, args.output, args.measure_every)
    config = next(plan.cells())[1]
    context = join(config)
    with only_job_in(args.output):
        try:
            stopped = run_cells(plan, context, signals)
        except BaseException:
            _report_before_the_end(args.output)
            raise
        summaries = write_report(args.output)
    print(markdown(summaries), f"{args.output}/table.md, growth.md, table.csv, picture.png", sep="\n")
    return exit_status(stopped)


def _report_before_the_end(folder: Path) -> None:
    """Of the cells there are. A report that fails too must not hide why the sweep ended."""
    from nemohybrid.observe.lr_sweep import write_report

    try:
        write_report(folder)
    except Exception as error:
        print(f"nemohybrid sweep-lr: no report: {error!r}", file=sys.stderr)
