"""What a learning-rate sweep found: which cells diverged, what grew first in them, and one table of everything."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

RISE = 0.1
"""Nats by which the smoothed loss may end above its lowest point."""
GROWTH = 2.0
"""Times by which an output must exceed that of a run that trains, as in arXiv 2410.16682."""


@dataclass(frozen=True)
class Outcome:
    """One cell. `final`: mean loss of the last tenth of its steps, NaN where it broke off; `why`: empty unless it diverged."""

    arm: str
    lr: float
    seed: int
    initial: float
    final: float
    lowest: float
    why: str
    seconds: float
    norms: Mapping[int, Mapping[str, Sequence[float]]]

    @property
    def counted(self) -> float:
        """The loss that enters means and pictures: never above the initial one (Wortsman et al. 2023, section 2.2).

        Infinite where the first step already failed: such a run has no initial loss.
        """
        return self.initial if math.isnan(self.final) else min(self.final, self.initial)


def read_outcomes(folder: Path) -> list[Outcome]:
    """The cells that are finished, in the order of arm, rate and seed."""
    outcomes = [outcome_of(json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]
    return sorted(outcomes, key=lambda cell: (cell.arm, cell.lr, cell.seed))


def outcome_of(record: Mapping[str, Any]) -> Outcome:
    """Judge the record of a cell by the three signs of divergence (docs/stability.md)."""
    losses = record["losses"]
    smooth = smoothed(losses)
    final = math.nan if record["failure"] else smooth[-1]
    lowest = min(smooth, default=math.nan)
    norms = {int(step): values for step, values in record["norms"].items()}
    initial = losses[0] if losses else math.inf
    why = divergence(final, lowest, record["unigram"])
    return Outcome(record["arm"], record["lr"], record["seed"], initial, final, lowest, why, record["seconds"], norms)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a window of a tenth of the steps."""
    window = max(1, len(losses) // 10)
    return [fmean(losses[end - window : end]) for end in range(window, len(losses) + 1)]


def divergence(final: float, lowest: float, unigram: float) -> str:
    """Why a run counts as diverged, or an empty string.

    not finite: loss or gradient overflowed. rose: the loss ends `RISE` above its lowest point. learned nothing: it ends no
    better than a model that knows only how frequent each token is.
    """
    if not math.isfinite(final):
        return "not finite"
    if final > lowest + RISE:
        return "rose"
    return "learned nothing" if final >= unigram else ""


@dataclass(frozen=True)
class Growth:
    """The output that was first more than `GROWTH` times that of the reference, `layer` counted within its slot."""

    slot: str
    layer: int
    step: int
    times: float

    def __str__(self) -> str:
        return f"{self.slot}[{self.layer}] at step {self.step}, {self.times:.3g} times"


def growths(run: Outcome, reference: Sequence[Outcome], step: int) -> list[Growth]:
    """Every output of `run` at a step as a multiple of its mean over `reference`, runs of the arm that train.

    Infinite where it overflowed. Left out where the reference is 0, a layer that is dead, or overflowed: it measures nothing.
    """
    then = [other.norms[step] for other in reference if step in other.norms]
    if not then:
        return []
    found = []
    for slot, values in run.norms[step].items():
        for layer, value in enumerate(values):
            usual = fmean(norms[slot][layer] for norms in then)
            if 0 < usual < math.inf:
                found.append(Growth(slot, layer, step, value / usual if math.isfinite(value) else math.inf))
    return found


def first_growth(run: Outcome, reference: Sequence[Outcome], slots: str = "") -> Growth | None:
    """The largest of the first step in which any output, of `slots` that begin so, is `GROWTH` times that of the reference."""
    for step in sorted(run.norms):
        found = (growth for growth in growths(run, reference, step) if growth.slot.startswith(slots))
        largest = max(found, key=lambda growth: growth.times, default=None)
        if largest is not None and largest.times >= GROWTH:
            return largest
    return None


def last_growths(run: Outcome, reference: Sequence[Outcome]) -> dict[str, float]:
    """Slot -> the multiple of its worst layer in the last step that was measured."""
    found = sorted(growths(run, reference, max(run.norms)), key=lambda growth: growth.times) if run.norms else []
    return {growth.slot: growth.times for growth in found}  # the worst layer comes last


@dataclass(frozen=True)
class MeanGrowth:
    """Geometric mean over runs of the multiple of an output. A run in which the output is 0, `dead`, has no logarithm."""

    times: float  # over the runs in which it is not 0; 0 where there are none
    dead: int

    def __str__(self) -> str:
        return f"{self.times:.3g}" + (f" (0 in {self.dead})" if self.dead else "")


def mean_growth(times: Sequence[float]) -> MeanGrowth:
    """Of one output, a number a run."""
    alive = [value for value in times if value]
    return MeanGrowth(geometric_mean(alive) if alive else 0.0, len(times) - len(alive))


@dataclass(frozen=True)
class ArmSummary:
    """One arm over all rates. `limit`: the largest rate up to which no seed diverged, 0 where there is none.

    `best` is infinite, and `sensitivity` no number, where every rate has a run that failed in its first step.
    """

    arm: str
    cells: Mapping[float, Sequence[Outcome]]
    limit: float
    best: float  # the lowest mean loss over seeds
    sensitivity: float  # mean over rates of the loss above the best, clipped at the initial loss

    @property
    def reference(self) -> Sequence[Outcome]:
        """The runs at the limit: what diverged runs are compared with."""
        return self.cells.get(self.limit, ())

    @property
    def diverged(self) -> list[Outcome]:
        """All runs that did, at any rate."""
        return [run for runs in self.cells.values() for run in runs if run.why]

    def grew_first(self, slots: str = "") -> Counter[str]:
        """Slot -> diverged runs in which it grew first, among those that begin with `slots`."""
        found = (first_growth(run, self.reference, slots) for run in self.diverged)
        return Counter("nothing" if growth is None else growth.slot for growth in found)

    def grew_by(self) -> dict[str, MeanGrowth]:
        """Slot -> mean over the diverged runs of the multiple of its worst layer at the end."""
        found: dict[str, list[float]] = {}
        for run in self.diverged:
            for slot, times in last_growths(run, self.reference).items():
                found.setdefault(slot, []).append(times)
        return {slot: mean_growth(times) for slot, times in found.items()}


def summarize(outcomes: Sequence[Outcome]) -> list[ArmSummary]:
    """Every arm, the one that stays stable longest first; sensitivity as Wortsman et al. 2023 (section 2.2) define it."""
    arms = {run.arm: {} for run in outcomes}
    for run in outcomes:
        arms[run.arm].setdefault(run.lr, []).append(run)
    summaries = [_summary(arm, dict(sorted(cells.items()))) for arm, cells in arms.items()]
    return sorted(summaries, key=lambda s: (-s.limit, s.best))


def _summary(arm: str, cells: Mapping[float, Sequence[Outcome]]) -> ArmSummary:
    limit = 0.0
    for lr, runs in cells.items():
        if any(run.why for run in runs):
            break
        limit = lr
    means = [fmean(run.counted for run in runs) for runs in cells.values()]
    return ArmSummary(arm, cells, limit, min(means), fmean(means) - min(means))


def markdown(summaries: Sequence[ArmSummary]) -> str:
    """Final loss by arm and rate, mean and half the spread over seeds; how many diverged; what grew first."""
    rates = sorted({lr for summary in summaries for lr in summary.cells})
    head = ["arm", *(f"{lr:g}" for lr in rates), "stable up to", "sensitivity", "grew first", "first within `M`"]
    rows = [_row(summary, rates) for summary in summaries]
    return "\n".join(_line(cells) for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(summary: ArmSummary, rates: Sequence[float]) -> list[str]:
    cells = [_cell(summary.cells.get(lr, ())) for lr in rates]
    limit = f"{summary.limit:g}" if summary.limit else "none"
    sensitivity = f"{summary.sensitivity:.3f}" if math.isfinite(summary.sensitivity) else "none"
    return [summary.arm, *cells, limit, sensitivity, *(_first(summary, slots) for slots in ("", "mamba2."))]


def _first(summary: ArmSummary, slots: str) -> str:
    """`mlp.fc2 3, attention.qkv.k 1`: in how many of the diverged runs."""
    counts = summary.grew_first(slots).most_common()
    return ", ".join(f"{slot.removeprefix(slots)} {count}" for slot, count in counts) or "none diverged"


def _cell(runs: Sequence[Outcome]) -> str:
    if not runs:
        return ""
    losses = [run.counted for run in runs]
    bad = sum(bool(run.why) for run in runs)
    spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
    text = f"{fmean(losses):.3f}{spread}" if math.isfinite(max(losses)) else "no loss"
    return f"{text} ({bad}/{len(runs)} diverged)" if bad else text


def growth_markdown(summaries: Sequence[ArmSummary]) -> str:
    """How many times larger than at the limit the outputs of diverged runs were at the end: a row a slot, a column an arm.

    Empty where an arm has no such layers.
    """
    columns = {summary.arm: growth for summary in summaries if (growth := summary.grew_by())}
    slots = sorted(dict.fromkeys(slot for growth in columns.values() for slot in growth))
    rows = [[slot, *(str(growth.get(slot, "")) for growth in columns.values())] for slot in slots]
    head = ["output", *columns]
    return "\n".join(_line(cells) for cells in [head, ["---"] * len(head), *rows]) + "\n"


def table(summaries: Sequence[ArmSummary]) -> str:
    """A row a cell, as CSV: the raw numbers."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["arm", "lr", "seed", "initial", "final", "lowest", "diverged", "grew_first", "grew_first_in_M", "seconds"])
    for summary in summaries:
        for run in (run for runs in summary.cells.values() for run in runs):
            grew = [(run.why and first_growth(run, summary.reference, slots)) or "" for slots in ("", "mamba2.")]
            losses = [f"{value:.4f}" for value in (run.initial, run.final, run.lowest)]
            write([run.arm, f"{run.lr:g}", run.seed, *losses, run.why, *grew, run.seconds])
    return text.getvalue()


def draw(summaries: Sequence[ArmSummary], path: Path) -> None:
    """Final loss over the learning rate as a PNG: a line an arm, the spread of its seeds, a cross where one diverged.

    A run without any loss stands as high as the worst that has one.
    """
    from matplotlib.figure import Figure  # a second of import, only for who draws

    every = [run.counted for summary in summaries for runs in summary.cells.values() for run in runs]
    top = max(filter(math.isfinite, every), default=1.0)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, summary in enumerate(summaries):
        color, rates = f"C{number % 10}", list(summary.cells)
        losses = [[min(run.counted, top) for run in runs] for runs in summary.cells.values()]
        style = "-" if number < 10 else "--"
        axes.plot(rates, [fmean(of) for of in losses], style, marker=".", color=color, label=summary.arm)
        axes.fill_between(rates, [min(of) for of in losses], [max(of) for of in losses], color=color, alpha=0.15)
        bad = [(run.lr, min(run.counted, top)) for runs in summary.cells.values() for run in runs if run.why]
        axes.plot([lr for lr, _ in bad], [loss for _, loss in bad], "x", color=color, markersize=9)
    axes.set(xscale="log", xlabel="learning rate", ylabel="final training loss, nats per token (x: diverged)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_report(folder: Path) -> list[ArmSummary]:
    """table.md, growth.md, table.csv and picture.png of the cells that lie in <folder>/cells."""
    summaries = summarize(read_outcomes(folder / "cells"))
    if summaries:
        (folder / "table.md").write_text(markdown(summaries))
        (folder / "growth.md").write_text(growth_markdown(summaries))
        (folder / "table.csv").write_text(table(summaries))
        draw(summaries, folder / "picture.png")
    return summaries
