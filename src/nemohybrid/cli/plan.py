"""`nemohybrid plan pipeline OVERRIDE...`: how a pipeline is cut, when ranks wait, what they keep, before it runs.

`nemohybrid plan layout` has a file of its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemohybrid.cli import plan_layout
from nemohybrid.cli.arguments import data_ranks_for, whole_number, without_files
from nemohybrid.config.compose import compose_raw, load_config
from nemohybrid.config.overrides import usable_overrides
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.parallel.schedule import legal_microbatches
from nemohybrid.plan.cost import Costs, from_json, modelled, to_json
from nemohybrid.plan.gantt import svg
from nemohybrid.plan.hardware import DEVICES, device
from nemohybrid.plan.pipeline import PipelinePlan, microbatches_of, peak_activations, plan_pipeline, strip
from nemohybrid.symbols import parse_pattern

if TYPE_CHECKING:
    import torch

GIB = 2**30
MOST = 4
"""Microbatches for each rank that are shown where --microbatches does not say: more look the same."""
DESCRIPTION = """Show a pipeline before it runs: which layers each rank has, how long it computes and waits, what it
keeps.

Nothing is trained and no other process is needed. Times are modelled from the sizes of the layers (docs/pipeline.md),
or measured. Overrides are those of `train`."""
EXAMPLES = """examples:
  nemohybrid plan pipeline model=tiny parallel.pipeline=2 --out pipeline.svg
  nemohybrid plan pipeline experiment=nemotron3_super parallel.pipeline=4 parallel.virtual_pipeline=2 --microbatches 32
  nemohybrid plan pipeline model=tiny parallel.pipeline=2 --measure        # with the times of this machine

A run cuts a pattern without `|` by the model of an H100, on every machine. What --device, --measured or --measure cut
otherwise is shown as a pattern with `|`, to be given as model.pattern."""


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="nemohybrid plan", description="Look ahead.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser(
        "pipeline",
        help="stages, bubbles and memory of a pipeline",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="model, parallel, train, data.sequence_length")
    p.add_argument("--out", type=Path, default=Path("pipeline.svg"), help="the picture (default pipeline.svg)")
    p.add_argument(
        "--microbatches",
        type=whole_number,
        help=f"of a step, on every data rank; default: those of the configuration, at most {MOST} for each rank",
    )
    p.add_argument("--device", default="H100", help=f"whose times are modelled: {', '.join(DEVICES)} (default H100)")
    given = p.add_mutually_exclusive_group()
    given.add_argument("--measured", type=Path, metavar="FILE", help="times to take instead, as --measure writes them")
    given.add_argument(
        "--measure", action="store_true", help="measure the times here, and write them beside the picture, as .json"
    )
    p.set_defaults(run=pipeline)
    plan_layout.add_parser(commands)
    return parser


def main(argv: list[str]) -> int:
    """Run `nemohybrid plan` on `argv`; 0 when done. Raises ConfigError for what cannot be planned."""
    options, rest = build_parser().parse_known_args(argv)
    if wrong := [word for word in rest if word.startswith("-")]:
        build_parser().error(f"unrecognized arguments: {' '.join(wrong)}")
    options.overrides += rest  # words after an option
    return options.run(options)


def pipeline(args: argparse.Namespace) -> int:
    """Print the strip and the table, and draw the step."""
    config = composed(args.overrides)
    costs = costs_of(config, args)
    plan = plan_pipeline(config, args.microbatches or _shown(config), costs)
    print("\n".join([*strip(plan), "", *table(plan, *_kept(config, plan)), "", *_by_hand(config, plan)]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg(plan), encoding="utf-8")
    print(f"wrote {args.out}")
    if args.measure:
        file = args.out.with_suffix(".json")
        file.write_text(to_json(costs), encoding="utf-8")
        print(f"wrote {file}, what was measured: for --measured")
    return 0


def composed(words: Sequence[str]) -> RunConfig:
    """The configuration, every rule checked, in a world that its layout fills. `parallel.data=auto` is one rank, or as many
    as the experts need."""
    words = without_files(words)
    usable = [str(override.input_line) for override in usable_overrides(words, [])]  # load_config names the others
    layout = compose_raw(usable).parallel
    data = int(layout.data) if str(layout.data).isdecimal() else data_ranks_for(layout)
    return load_config(words, max(1, data * layout.tensor * layout.pipeline * layout.context))


def costs_of(config: RunConfig, args: argparse.Namespace) -> Costs:
    """Modelled, read or measured, as the options say."""
    if args.measured:
        return from_json(args.measured, config)
    if args.measure:
        from nemohybrid.plan.measure import measure  # torch takes seconds

        return measure(config, _here(config))
    return modelled(config, device(args.device))


def _here(config: RunConfig) -> "torch.device":
    import torch

    has_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    if config.run.device == "cuda" and not has_gpu:
        raise ConfigError("run.device=cuda: there is no GPU to measure on")
    return torch.device("cuda" if has_gpu else "cpu")


def _shown(config: RunConfig) -> int:
    """Microbatches of a step, no more than a picture needs, and as many as every schedule can run."""
    data = int(config.parallel.data) if config.parallel.data.isdecimal() else 1
    number, ranks = microbatches_of(config, data), config.parallel.pipeline
    most = min(number, MOST * ranks)
    return most if number <= MOST * ranks or legal_microbatches(ranks, most) else number


def _kept(config: RunConfig, plan: PipelinePlan) -> tuple[Sequence[int] | None, str]:
    """Bytes of activations of each rank, and where they could not be counted why."""
    try:
        return peak_activations(config, plan, "cpu" if config.run.device == "cpu" else "cuda"), ""
    except Exception as error:  # a mixer of the user's own may do what has no meta form
        return None, f"activations not counted: {type(error).__name__}: {error}".splitlines()[0]


def table(plan: PipelinePlan, kept: Sequence[int] | None, why: str = "") -> list[str]:
    """A line a rank: times of one microbatch, and activations at the worst moment of a step."""
    lines = [
        f"{'rank':>4}{'layers':>8}{'forward':>12}{'backward':>12}{'idle':>9}{'activations':>14}",
        f"{'':>12}{'ms':>12}{'ms':>12}{'%':>9}{'GiB':>14}",
    ]
    for rank, own in enumerate(plan.segments):
        time, layers = plan.time_of(rank), sum(len(segment.symbols) for segment in own)
        size = f"{kept[rank] / GIB:.2f}" if kept else "-"
        times = f"{1e3 * time.forward:>12.3f}{1e3 * time.backward:>12.3f}"
        lines.append(f"{rank:>4}{layers:>8}{times}{100 * plan.timeline.idle[rank]:>9.1f}{size:>14}")
    total = f"a step takes {1e3 * plan.timeline.makespan:.1f} ms, {1e3 * plan.timeline.ideal:.1f} ms if nobody waited"
    return [*lines, f"{total}; bubble {100 * plan.timeline.bubble:.1f} %", *([why] if why else [])]


def _by_hand(config: RunConfig, plan: PipelinePlan) -> list[str]:
    """What to write where a run would be cut otherwise than what is shown."""
    if plan.ranks == 1 or plan.pattern.segments == plan_pipeline(config, plan.ranks).pattern.segments:
        return []
    assert parse_pattern(config.model.pattern).main == plan.pattern.main
    return [f"to train with these cuts: 'model.pattern=\"{plan.pattern.canonical}\"'", ""]
