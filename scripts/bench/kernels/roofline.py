"""Times every launch of our kernels by itself, and compares it with what its bytes and FLOPs would take at least.

python scripts/bench/kernels/roofline.py --out out.json      # on a GPU
python scripts/bench/kernels/roofline.py --rehearse

The launches of nemohybrid_kernels/calls.py are recorded while they run, and then repeated one by one. The peaks are those of
the data sheet. docs/benchmarks/kernels_method.md says how, counts.py what is counted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # where tune_kernels.py is
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from counts import Kernel, of_launch
from timing import Times, alone, device_for
from tune_kernels import REHEARSED, TINY, Filled

from nemohybrid.plan.hardware import DEVICES, Device
from nemohybrid_kernels.calls import CASES, Case, of_mixers, run_mixer
from nemohybrid_kernels.launching import Launch, architecture, launch, recording
from nemohybrid_kernels.machine import machine


@dataclass(frozen=True)
class Timed:
    """A launch, the median of its seconds, and the lowest and highest of them."""

    kernel: Kernel
    seconds: float
    spread: tuple[float, float]
    least: float | None  # seconds, by the peaks of the device; None where they are not known

    @property
    def fraction(self) -> float | None:
        """Of the roofline."""
        return None if self.least is None else self.least / self.seconds


@dataclass
class Found:
    """What came of a case."""

    case: str
    timed: list[Timed] = field(default_factory=list)
    fault: str | None = None


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured."""

    device: torch.device
    rounds: int

    @property
    def peaks(self) -> Device | None:
        """The data sheet; None for what has none here."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((known for part, known in DEVICES.items() if part in name), None)

    def measure(self, case: Case) -> Found:
        """Every launch of the case, in order; or what went wrong: the others are not to be lost for one."""
        try:
            return Found(case.name, [self._time(it) for it in self._launches(case)])
        except Exception as error:
            words = str(error).strip().split("\n", 1)[0]
            return Found(case.name, fault=f"{type(error).__name__}: {words}"[:200])

    def _launches(self, case: Case) -> list[Launch]:
        """They run here once: compiled, and with what they read in its place."""
        make = Filled(torch.Generator(self.device).manual_seed(0), self.device)
        with recording(architecture(self.device), runs=True) as found:
            case.run(make)
        return list(found)

    def _time(self, it: Launch) -> Timed:
        times = alone(partial(launch, it.kernel, it.grid, it.config, **it.arguments), self.device, self.rounds)
        return timed(of_launch(it), times, self.peaks)


def timed(kernel: Kernel, times: Times, peaks: Device | None) -> Timed:
    least = None if peaks is None else kernel.seconds(peaks.memory, peaks.flops)
    return Timed(kernel, times.median, (min(times.seconds), max(times.seconds)), least)


def plan(rehearse: bool) -> list[Case]:
    """The most important first: the mixer as a whole, what is fused outside of it, its shards and other sizes."""
    if rehearse:
        return [*of_mixers("mixer", run_mixer, tiny=TINY), *(case for case in REHEARSED if _rank(case) < 3)]
    bf16 = [case for case in CASES if "fp32" not in case.name]
    return sorted(bf16, key=_rank)


def _rank(case: Case) -> int:
    operator = case.name.split()[0]
    return 0 if case.name == "mixer whole" else 2 if operator == "mixer" else 3 if operator in ("conv", "ssd") else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each case, write all of them after each. 1 where a case could not be measured."""
    options = _parse(argv)
    bench = Bench(device_for(options.rehearse), options.rounds or (1 if options.rehearse else 20))
    began, found, left = time.monotonic(), list[Found](), list[str]()
    facts = machine(bench.device) | {"date": time.strftime("%Y-%m-%d"), "rehearsal": str(options.rehearse)}
    print(*(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n", flush=True)
    for case in plan(options.rehearse):
        if time.monotonic() - began > options.seconds:
            left.append(case.name)
        else:
            found.append(bench.measure(case))
            print(*table(found[-1]), sep="\n", flush=True)
        if options.out:
            options.out.write_text(json.dumps(report(facts, bench.peaks, found, left), indent=1) + "\n")
    if left:
        print(f"left out for want of time: {', '.join(left)}")
    return 1 if any(of.fault for of in found) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of which the median counts (20; in a rehearsal 1)")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="begin nothing after so long (default %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, for its code")
    parser.add_argument("--out", type=Path, help="write all figures to this file, as JSON")
    return parser.parse_args(argv)


def report(
    facts: dict[str, str], peaks: Device | None, found: Sequence[Found], left: Sequence[str]
) -> dict[str, object]:
    """For --out."""
    cases = [asdict(of) for of in found]
    for case, of in zip(cases, found, strict=True):
        for row, it in zip(case["timed"], of.timed, strict=True):
            row["fraction"] = it.fraction
    return {"machine": facts, "peaks": peaks and asdict(peaks), "cases": cases, "left_out": list(left)}


HEADINGS = f"{'':30}{'us':>9}{'MB':>9}{'GFLOP':>9}{'GB/s':>8}{'TFLOP/s':>9}{'of roofline':>13}"


def table(of: Found) -> list[str]:
    """A line for each launch, and for all of them."""
    if of.fault is not None:
        return [f"{of.case}: {of.fault}"]
    known = [it.least for it in of.timed if it.least is not None]
    seconds, least = sum(it.seconds for it in of.timed), sum(known) if known else None
    whole = Kernel("together", *(sum(getattr(it.kernel, what) for it in of.timed) for what in ("bytes", "flops")))
    lines = [row(it.kernel, it.seconds, it.least) for it in of.timed]
    return [of.case, *lines, row(whole, seconds, least)]


def row(kernel: Kernel, seconds: float, least: float | None) -> str:
    figures = f"{1e6 * seconds:9.1f}{kernel.bytes / 1e6:9.1f}{kernel.flops / 1e9:9.1f}"
    rates = f"{kernel.bytes / seconds / 1e9:8.0f}{kernel.flops / seconds / 1e12:9.1f}"
    return f"  {kernel.name:28}{figures}{rates}{'-' if least is None else format(least / seconds, '.0%'):>13}"


if __name__ == "__main__":
    sys.exit(main())
