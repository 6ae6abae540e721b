"""Times our kernels, those of mamba-ssm, and plain PyTorch on parts of the Mamba-2 mixer, in turns in one process.

python scripts/bench/kernels/against_mamba.py --out out.json            # on a GPU: the main sizes, then the grid
python scripts/bench/kernels/against_mamba.py --rehearse

A side that computes something else than the others has no time. Exits with 1 where ours does, or cannot run; a bar that is
missed is said, and no error. What takes longer than --seconds is left out, the least important first, and said.
docs/benchmarks/kernels_method.md says what is compared and how.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from cases import MAIN, TINY, Sizes, bar, grid
from parts import MIDDLE, PARTS, SCAN, Inputs, Part, Side
from peer import Peer, PeerMissing, load
from timing import device_for, in_turns, ratios
from torch import Tensor

from nemohybrid_kernels.machine import machine

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.05}
"""Of the norm of an output or a gradient: mamba-ssm multiplies fp32 in TF32, and sums of thousands of rounded products drift."""
TWIN_UP_TO = 8192
"""Tokens that PyTorch scans in fp32 to say what is right: it keeps whole squares of every chunk and head."""


@dataclass
class Line:
    """What came of a part at some sizes, in one pass: `milliseconds` of each side that is right, `faults` of the others."""

    part: str
    sizes: str
    direction: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    spread: tuple[float, float] | None = None  # of `ratio`, lowest and highest turn
    ratio: float | None = None  # the peer's time to ours, median of turns
    peer: str | None = None
    errors: dict[str, float] = field(default_factory=dict)  # largest relative error of outputs and gradients
    faults: dict[str, str] = field(default_factory=dict)
    bar: float | None = None  # what `ratio` must reach
    verdict: str | None = None  # "pass" or "FAIL"; None where there is no bar, or nothing to compare with


@dataclass(frozen=True)
class Bench:
    """How everything is measured. `twin_rounds`: of plain PyTorch, which is slow."""

    device: torch.device
    peer: Peer | None
    rounds: int
    twin: bool = True


def measure(bench: Bench, part: Part, sizes: Sizes) -> list[Line]:
    """Forward, and forward with backward."""
    inputs = part.inputs(sizes, bench.device)
    sides = dict(part.sides(sizes, bench.peer))
    directions = ["forward", "both"] if part.has_backward else ["forward"]
    lines = [Line(part.name, str(sizes), direction, bar=bar_of(part, sizes, direction)) for direction in directions]
    errors, faults = judge(sides, inputs, part.has_backward, sizes)
    right = {name: side for name, side in sides.items() if name not in faults}
    if not bench.twin:
        right.pop("torch", None)
    for line in lines:
        line.errors, line.faults = errors, dict(faults)
        _time(bench, line, right, inputs)
        line.verdict = verdict(line)
    return lines


def bar_of(part: Part, sizes: Sizes, direction: str) -> float | None:
    """None in a rehearsal, which is in fp32: its times mean nothing."""
    if part is not MIDDLE or direction != "both" or sizes.dtype != torch.bfloat16:
        return None
    return bar(sizes)


def verdict(line: Line) -> str | None:
    """Of its bar. What ours cannot compute it does not compute fast enough."""
    if line.bar is None or (line.ratio is None and "ours" not in line.faults):
        return None
    return "pass" if line.ratio is not None and line.ratio >= line.bar else "FAIL"


def _time(bench: Bench, line: Line, sides: Mapping[str, Side], inputs: Inputs) -> None:
    make = forward if line.direction == "forward" else both
    times = in_turns({name: make(side, inputs) for name, side in sides.items()}, bench.device, bench.rounds)
    line.milliseconds = {name: 1000 * taken.median for name, taken in times.items()}
    line.peer = min((name for name in times if name not in ("ours", "torch")), key=line.milliseconds.get, default=None)  # type: ignore[arg-type]
    if line.peer is not None and "ours" in times:
        compared = ratios(times[line.peer], times["ours"])
        line.ratio, line.spread = statistics.median(compared), (min(compared), max(compared))


def forward(side: Side, inputs: Inputs) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> Tensor:
        return side(**inputs)

    return call


def both(side: Side, inputs: Inputs) -> Callable[[], object]:
    """Forward and backward, for gradients of everything."""
    leaves, wanted = differentiable(inputs)
    gradient = None

    def call() -> object:
        nonlocal gradient
        y = side(**leaves)
        if gradient is None:
            gradient = torch.ones_like(y)
        return torch.autograd.grad(y, list(wanted.values()), gradient)

    return call


def differentiable(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """The inputs as leaves, and those of them that have gradients."""
    leaves = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    return leaves, {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}


# --- what is right ---------------------------------------------------------------------------------------------------


def judge(
    sides: Mapping[str, Side], inputs: Inputs, has_backward: bool, sizes: Sizes
) -> tuple[dict[str, float], dict[str, str]]:
    """Largest error of each side that ran, and why others have no times.

    Right is what plain PyTorch computes in fp32; for rows too long for it, what the first of the peer's sides does.
    """
    if sizes.tokens <= TWIN_UP_TO:
        exact = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
        expected, fault = attempt(lambda: results(sides["torch"], exact, has_backward))
    else:
        others = [name for name in sides if name not in ("ours", "torch")]
        expected, fault = attempt(lambda: results(sides[others[0]], inputs, has_backward)) if others else (None, None)
    errors: dict[str, float] = {}
    faults: dict[str, str] = {} if sizes.tokens <= TWIN_UP_TO else {"torch": "rows too long for it"}
    for name, side in sides.items():
        if name in faults:
            continue
        found, fault_of_side = attempt(partial(results, side, inputs, has_backward))
        if found is None:
            faults[name] = fault_of_side or "it failed"
        elif expected is not None:
            errors[name], worst = _largest_error(found, expected)
            if not errors[name] <= TOLERANCE[sizes.dtype]:
                faults[name] = f"wrong: {worst} is off by {errors[name]:.1e} of its norm"
    if expected is None and fault is not None:
        faults.setdefault("ours", f"there is nothing to compare it with: {fault}")
    return errors, faults


def results(side: Side, inputs: Inputs, has_backward: bool) -> dict[str, Tensor]:
    """The output, and gradients under a fixed gradient of it."""
    if not has_backward:
        return {"output": forward(side, inputs)()}  # type: ignore[dict-item]
    leaves, wanted = differentiable(inputs)
    y = side(**leaves)
    generator = torch.Generator(y.device).manual_seed(1)
    gradient = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
    gradients = torch.autograd.grad(y, list(wanted.values()), gradient)
    return {"output": y.detach(), **{f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}}


def attempt(compute: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor] | None, str | None]:
    """What it computed, or why it could not: another's kernel may fail in any way, and the benchmark goes on without it."""
    try:
        return compute(), None
    except Exception as error:
        words = str(error).strip().split("\n", 1)[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, f"{type(error).__name__}: {words}"[:200]


def _largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    errors = {name: relative_error(found[name], wanted) for name, wanted in expected.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


# --- the whole benchmark ---------------------------------------------------------------------------------------------


def plan(rehearse: bool) -> list[tuple[Part, Sizes]]:
    """The most important first."""
    if rehearse:
        return [*((part, TINY) for part in PARTS), (MIDDLE, replace(TINY, packed=True))]
    main = [(part, MAIN) for part in PARTS]
    return main + [(part, sizes) for sizes in grid() if sizes != MAIN for part in (MIDDLE, SCAN)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line for each, write all of them after each."""
    options = _parse(argv)
    device = device_for(options.rehearse)
    began, lines, left = time.monotonic(), list[Line](), list[str]()
    try:
        peer, missing = load(), None
    except PeerMissing as error:
        peer, missing = None, str(error)
    facts = machine(device) | {"date": time.strftime("%Y-%m-%d"), "rehearsal": str(options.rehearse)}
    facts["peer"] = missing or f"mamba-ssm {peer.version}, with the convolution of {peer.conv}"  # type: ignore[union-attr]
    print(*(f"{name}: {fact}" for name, fact in facts.items()), HEADINGS, sep="\n", flush=True)
    for part, sizes in plan(options.rehearse):
        if time.monotonic() - began > options.seconds:
            left.append(f"{part.name} at {sizes}")
            continue
        bench = Bench(device, peer, options.rounds, twin=options.rehearse or sizes == MAIN)
        for line in measure(bench, part, sizes):
            lines.append(line)
            print(row(line), flush=True)
        _write(options.out, facts, lines, left)
    _write(options.out, facts, lines, left)
    print(*summary(lines, left), sep="\n")
    return 1 if any("ours" in line.faults for line in lines) else 0


def _write(file: Path | None, facts: dict[str, str], lines: Sequence[Line], left: Sequence[str]) -> None:
    if file is not None:
        written = {"machine": facts, "lines": [asdict(line) for line in lines], "left_out": left}
        file.write_text(json.dumps(written, indent=1) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="turns of each side (15; in a rehearsal 1)")
    parser.add_argument(
        "--seconds", type=float, default=400.0, help="begin nothing after so long (default %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, for its code")
    parser.add_argument("--out", type=Path, help="write all figures to this file, as JSON")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.rehearse else 15)
    return options


HEADINGS = f"{'part':8}{'sizes':58}{'pass':9}{'ours':>9}{'peer':>9}{'torch':>9}  bar       peer/ours (turns)"


def row(line: Line) -> str:
    """A line of the table, times in milliseconds."""
    times: dict[str, Any] = {"ours": None, "torch": None} | line.milliseconds
    cells = [times["ours"], times[line.peer] if line.peer else None, times["torch"]]
    shown = "".join(f"{'-' if cell is None else format(cell, '.3f'):>9}" for cell in cells)
    judged = "" if line.verdict is None else f"{line.bar:.1f} {line.verdict}"
    compared = "" if line.ratio is None or line.spread is None else _compared(line.ratio, line.spread, line.peer)
    faults = "".join(f"\n    {name}: {fault}" for name, fault in line.faults.items())
    return f"{line.part:8}{line.sizes:58}{line.direction:9}{shown}  {judged:8}{compared}".rstrip() + faults


def _compared(ratio: float, spread: tuple[float, float], peer: str | None) -> str:
    return f"  {ratio:.2f} ({spread[0]:.2f}..{spread[1]:.2f}) {peer}"


def summary(lines: Sequence[Line], left: Sequence[str]) -> list[str]:
    """The bars, what else is slower, and what is missing."""
    said = [f"left out for want of time: {'; '.join(left)}"] if left else []
    barred = [line for line in lines if line.bar is not None]
    failed = [_named(line) for line in barred if line.verdict == "FAIL"]
    open_ones = sum(line.verdict is None for line in barred)
    if met := [line for line in barred if line.verdict == "pass"]:
        said.append(f"bars met: {len(met)} of {len(barred)}")
    if failed:
        said.append(f"bars MISSED: {'; '.join(failed)}")
    if open_ones:
        said.append(f"bars with nothing to compare with: {open_ones}")
    rest = [line for line in lines if line.bar is None and line.ratio is not None]
    if slower := [_named(line) for line in rest if line.ratio is not None and line.ratio < 1]:
        said.append(f"slower than the peer, without a bar: {'; '.join(slower)}")
    return said


def _named(line: Line) -> str:
    return f"{line.part} {line.direction} at {line.sizes} ({'no time' if line.ratio is None else f'{line.ratio:.2f}'})"


if __name__ == "__main__":
    sys.exit(main())
