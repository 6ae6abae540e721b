"""Trains the same small hybrid with nemohybrid and with transformers, in turns, on the cores of this machine.

python scripts/bench/cpu_peer.py --json out.json
python scripts/bench/cpu_peer.py --page             # and puts the run into docs/benchmarks

Needs `pip install nemohybrid[hf]`, Linux, and for the C++ kernels of nemohybrid, which it builds, a compiler. Exits with 1
where nemohybrid is less than 1.6 times as fast with them or 1.4 times without, takes more memory, or the two do not compute
the same. docs/benchmarks/cpu_peer.md says what is compared, and why it is fair.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from cpu_peer_page import keep, to_json
from cpu_peer_sides import Opened, Turn, build_kernels, memory, open_ours, open_peer, prepare, take_turn, tune_peer

SPEED, PLAIN_SPEED = 1.6, 1.4
"""Least ratio of our tokens per second to theirs, with the C++ kernels and without."""
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-2, 0.02
"""Same model, same tokens: of the losses (nats) and the relative gradient norms of the first step, both in bf16."""
SETTINGS = list(product((16, 32, 64, 128, 256), ("sdpa", "eager")))
"""Chunk sizes of the scan and attention implementations that transformers is tried with."""
BUSY = 0.1
"""Share of the cores in use by others from which on the figures deserve a warning."""


@dataclass(frozen=True)
class Result:
    """One side after all turns. Memory in bytes, losses in nats."""

    parameters: int
    tokens_per_second: list[float]  # of each turn
    losses: list[float]
    first_gradient_norm: float
    peak: int
    baseline: int

    @property
    def above_baseline(self) -> int:
        """Memory that data, model and training took."""
        return self.peak - self.baseline


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, and judge."""
    options = parse(argv)
    os.environ.update(OMP_NUM_THREADS=str(options.threads), GOMP_SPINCOUNT="1000")  # as scripts/quickstart.sh
    others = psutil.cpu_percent(interval=1.0) / 100
    with tempfile.TemporaryDirectory() as folder:
        if options.plain:
            os.environ["NEMOHYBRID_CACHE"] = f"{folder}/none"
        report = compare(folder, options)
    report = {"machine": machine(options.threads), "busy_before": others, **report}
    if options.json:
        options.json.write_text(to_json(report))
    faults = failures(
        report["nemohybrid"], report["transformers"], SPEED if report["kernels"]["built"] else PLAIN_SPEED
    )
    printed = f"{table(report)}\n" + ("\n".join(faults) or "all conditions hold")
    print(printed)
    if options.page:
        keep(report, printed)
    return 1 if faults and not options.no_check else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=_positive, default=15, help="turns of each side (default %(default)s)")
    parser.add_argument("--steps", type=_positive, default=6, help="steps of a turn (default %(default)s)")
    parser.add_argument("--warmup", type=_positive, default=6, help="steps before the first turn (default %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=7, help="steps to tune each setting (default %(default)s)")
    parser.add_argument("--threads", type=_positive, default=2, help="of each side (default %(default)s)")
    parser.add_argument("--plain", action="store_true", help="nemohybrid without its C++ kernels")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--page", action="store_true", help="write docs/benchmarks/cpu_peer.json, .txt and its row in .md"
    )
    parser.add_argument("--no-check", action="store_true", help="exit with 0 whatever comes out")
    parser.add_argument("overrides", nargs="*", help="of our configuration, for other sizes: model.hidden_size=256")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


# --- running ---------------------------------------------------------------------------------------------------------


def compare(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Find what suits transformers best, then let both sides take their turns."""
    steps = max(options.warmup + options.turns * options.steps, options.rounds + 1)
    with own_process() as process:
        built, words = process.submit(build_kernels).result() if not options.plain else (False, "not wanted")
    with own_process() as process:
        sizes = process.submit(prepare, folder, steps, options.overrides).result()
    with own_process() as process:
        seconds = process.submit(tune_peer, folder, SETTINGS, options.rounds).result()
    chunk_size, attention = best = SETTINGS[seconds.index(min(seconds))]
    tuning = [{"chunk_size": c, "attention": a, "seconds": t} for (c, a), t in zip(SETTINGS, seconds, strict=True)]
    with ExitStack() as stack:
        ours, peer = processes = [stack.enter_context(own_process()) for _ in range(2)]
        opened = (
            ours.submit(open_ours, folder, options.overrides).result(),
            peer.submit(open_peer, folder, *best).result(),
        )
        results, busy = alternate(processes, opened, sizes["batch"] * sizes["sequence_length"], options)
    return {
        "settings": {**sizes, **vars(options), "json": None},
        "kernels": {"built": built, "words": words},
        "tuning": tuning,
        "chosen": {"chunk_size": chunk_size, "attention": attention},
        "busy_during": busy,
        "nemohybrid": results[0],
        "transformers": results[1],
    }


def alternate(
    processes: Sequence[ProcessPoolExecutor],
    opened: Sequence[Opened],
    tokens_per_step: int,
    options: argparse.Namespace,
) -> tuple[list[Result], float]:
    """Turns, one side after the other; who has no turn sleeps on a pipe.

    Returns a result for each side, and the share of all cores that other programs used meanwhile.
    """
    warm = [process.submit(take_turn, options.warmup).result() for process in processes]
    started, busy = time.perf_counter(), _busy_seconds()
    turns = [[process.submit(take_turn, options.steps).result() for process in processes] for _ in range(options.turns)]
    wall, busy = time.perf_counter() - started, _busy_seconds() - busy
    others = busy - sum(turn.cpu for pair in turns for turn in pair)
    peaks = [process.submit(memory, "VmHWM").result() for process in processes]
    columns = zip(opened, warm, zip(*turns, strict=True), peaks, strict=True)
    results = [summarize(tokens_per_step, *column) for column in columns]
    return results, max(0.0, others) / (wall * (os.cpu_count() or 1))


def own_process() -> ProcessPoolExecutor:
    """A fresh interpreter that does what is submitted, one after the other."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _busy_seconds() -> float:
    """Processor time spent on this machine since it started, by anybody."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


# --- figures ---------------------------------------------------------------------------------------------------------


def summarize(tokens_per_step: int, opened: Opened, warm: Turn, turns: Sequence[Turn], peak: int) -> Result:
    """The turns of one side. The warm-up counts for the losses only."""
    return Result(
        parameters=opened.parameters,
        tokens_per_second=[tokens_per_step * len(turn.seconds) / sum(turn.seconds) for turn in turns],
        losses=[loss for turn in (warm, *turns) for loss in turn.losses],
        first_gradient_norm=warm.gradient_norms[0],
        peak=peak,
        baseline=opened.baseline,
    )


def ratios(ours: Result, peer: Result) -> list[float]:
    """Our tokens per second to theirs, for each pair of turns."""
    return [a / b for a, b in zip(ours.tokens_per_second, peer.tokens_per_second, strict=True)]


def failures(ours: Result, peer: Result, least: float) -> list[str]:
    """Which conditions do not hold, in words."""
    speed = statistics.median(ratios(ours, peer))
    loss = abs(ours.losses[0] - peer.losses[0])
    norm = abs(ours.first_gradient_norm / peer.first_gradient_norm - 1)
    conditions = {
        f"{ours.parameters:,} parameters against {peer.parameters:,}": ours.parameters == peer.parameters,
        f"first losses differ by {loss:.4f} nats, more than {LOSS_TOLERANCE}": loss <= LOSS_TOLERANCE,
        f"first gradient norms differ by {norm:.2%}, more than {NORM_TOLERANCE:.0%}": norm <= NORM_TOLERANCE,
        "a loss did not fall": all(side.losses[-1] < side.losses[0] for side in (ours, peer)),
        f"{speed:.2f} times as fast, less than {least}": speed >= least,
        f"peak memory {_mib(ours.peak)} against {_mib(peer.peak)} MiB": ours.peak <= peer.peak,
        f"memory above the baseline {_mib(ours.above_baseline)} against {_mib(peer.above_baseline)} MiB": (
            ours.above_baseline <= peer.above_baseline
        ),
    }
    return [f"FAILED: {condition}" for condition, holds in conditions.items() if not holds]


def table(report: dict[str, Any]) -> str:
    """Everything a reader wants to know, for a terminal of 100 columns."""
    ours, peer = report["nemohybrid"], report["transformers"]
    settings, chosen = report["settings"], report["chosen"]
    pairs = ratios(ours, peer)
    lines = [
        *(f"{name}: {value}" for name, value in report["machine"].items()),
        f"model: {settings['pattern']}, width {settings['hidden_size']}, vocabulary {settings['vocabulary']}; "
        f"batch {settings['batch']} x {settings['sequence_length']}",
        f"C++ kernels of nemohybrid: {report['kernels']['words']}",
        "transformers, seconds of its fastest step:",
        *(f"  chunk {t['chunk_size']:3}, {t['attention']:5}  {t['seconds']:.3f}" for t in report["tuning"]),
        f"  chosen: chunk {chosen['chunk_size']}, {chosen['attention']}",
        "",
        f"{'':36}{'nemohybrid':>14}{'transformers':>14}",
        *(_row(name, value(ours), value(peer)) for name, value in ROWS.items()),
        "",
        f"speed ratio over {len(pairs)} pairs of turns of {settings['steps']} steps: median {statistics.median(pairs):.3f}, "
        f"min {min(pairs):.3f}, max {max(pairs):.3f}",
        f"cores in use by others: {report['busy_before']:.0%} before, {report['busy_during']:.0%} during the turns",
    ]
    if max(report["busy_before"], report["busy_during"]) > BUSY:
        lines.append("WARNING: other programs used the cores; do not quote these figures")
    return "\n".join(lines)


ROWS = {
    "parameters": lambda r: f"{r.parameters:,}",
    "tokens/s, median": lambda r: f"{statistics.median(r.tokens_per_second):,.0f}",
    "tokens/s, slowest turn": lambda r: f"{min(r.tokens_per_second):,.0f}",
    "tokens/s, fastest turn": lambda r: f"{max(r.tokens_per_second):,.0f}",
    "peak memory, MiB": lambda r: _mib(r.peak),
    "  of it imports, MiB": lambda r: _mib(r.baseline),
    "  above them, MiB": lambda r: _mib(r.above_baseline),
    "loss of step 1, nats": lambda r: f"{r.losses[0]:.4f}",
    "gradient norm of step 1": lambda r: f"{r.first_gradient_norm:.4f}",
    "loss of the last step, nats": lambda r: f"{r.losses[-1]:.4f}",
}
"""Name of a figure -> how it reads for a Result."""


def _row(name: str, *cells: str) -> str:
    return f"{name:36}" + "".join(f"{cell:>14}" for cell in cells)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def machine(threads: int) -> dict[str, str]:
    """Where and with what this ran."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{name} {version(name)}" for name in ("nemohybrid", "torch", "transformers"))
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores, {threads} threads a side, GOMP_SPINCOUNT=1000",
        "software": f"Python {platform.python_version()}, {packages}",
    }


if __name__ == "__main__":
    sys.exit(main())
