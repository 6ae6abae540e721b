"""Compiles the shipped kernels for GPUs that are not there, and prints what each takes of them.

python scripts/bench/compile_kernels.py                          # every binary for sm_80, sm_90 and sm_100
python scripts/bench/compile_kernels.py --only conv --arch 90    # with "conv" in the name of the case or kernel
python scripts/bench/compile_kernels.py --only ssd_scan "state 64" --arch 90 --set ssd_scan.ROWS=64 ssd_scan.warps=8
python scripts/bench/compile_kernels.py --page                   # writes docs/benchmarks/kernels_resources.md

Exits with 1 where a kernel spills registers, takes too much shared memory, or lost its tensor-core instructions. Results are
kept (NEMOHYBRID_COMPILED says where), so only what changed is compiled again.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from kernels_resources_page import PAGE, render

from nemohybrid_kernels.ahead_of_time import resources_of
from nemohybrid_kernels.launching import ARCHITECTURES, table
from nemohybrid_kernels.shipped import Binary, binaries

COLUMNS = (
    "{case:<23} {kernel:<20} {sm:>4} {type} {shape:<56} "
    "{warps:>5} {stages:>6} {registers:>9} {spills:>9} {shared:>7} {products}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    for text in args.set:
        override(text)
    began, rows = time.perf_counter(), []
    wanted = binaries(args.arch, args.only)
    print(COLUMNS.format_map({name: name for name in _Row}))
    for binary, result in compiled(wanted, args.processes):
        rows.append(row_of(binary, result))
        print(line_of(rows[-1]), flush=True)
    bad = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} binaries, {bad} not to be shipped, {time.perf_counter() - began:.0f} s")
    _write(args, rows)
    return 1 if bad else 0


_Row = ("case", "kernel", "sm", "type", "shape", "warps", "stages", "registers", "spills", "shared", "products")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of a case and a kernel, all of them")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--set", nargs="+", default=[], metavar="KERNEL.WHAT=NUMBER", help="a tile, warps or stages")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--page", action="store_true", help="write the page of the documentation")
    return parser.parse_args(arguments)


def override(text: str) -> None:
    """KERNEL.WHAT=NUMBER, in every entry of that kernel on every architecture."""
    path, _, number = text.partition("=")
    kernel, _, what = path.partition(".")
    for kernels in table().values():
        for entry in kernels.get(kernel) or sys.exit(f"there is no {kernel}; there are {', '.join(kernels)}"):
            where = entry if what in ("warps", "stages") else entry["tiles"]
            if what not in where:
                sys.exit(f"{kernel} has no {what}; it has warps, stages, {', '.join(entry['tiles'])}")
            where[what] = int(number)


def compiled(wanted: Sequence[Binary], processes: int) -> Iterator[tuple[Binary, Future[Any]]]:
    """In order, as they are done."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(resources_of, binary.compilation) for binary in wanted]
        yield from zip(wanted, results, strict=True)


def row_of(binary: Binary, result: Future[Any]) -> dict[str, Any]:
    """As plain data: what it is, and what it takes, or why it does not compile."""
    of = binary.compilation
    row = {"case": binary.case, "kernel": of.name, "sm": of.architecture, "type": of.dtype, "entry": binary.entry}
    row |= {"tiles": dict(of.config.tiles), "sizes": of.sizes, "warps": of.config.warps, "stages": of.config.stages}
    row |= {"triton": triton.__version__, "excuse": binary.excuse}
    if error := result.exception():
        return row | {"faults": [f"it does not compile: {error}"]}
    found = result.result()
    return row | asdict(found) | _judged(binary.faults(found), binary.excuse)


def _judged(faults: list[str], excuse: tuple[str, str, str] | None) -> dict[str, list[str]]:
    """Spills, and nothing else, can be excused."""
    spills = [fault for fault in faults if "spills" in fault]
    excused = spills if excuse else []
    return {"faults": [fault for fault in faults if fault not in excused], "excused": excused}


def line_of(row: dict[str, Any]) -> str:
    shown = row | {"shape": ",".join(f"{name}={value}" for name, value in row["sizes"].items())}
    number: Callable[[str], Any] = lambda name: row.get(name, "-")  # noqa: E731
    shown |= {name: number(name) for name in ("registers", "shared")}
    shown["spills"] = f"{number('spill_stores')}/{number('spill_loads')}"
    shown["products"] = " ".join(f"{count} {name}" for name, count in row.get("instructions", {}).items() if count)
    return "\n    ".join(
        [COLUMNS.format_map(shown), *row["faults"], *(f"{t} (let be)" for t in row.get("excused", []))]
    )


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if args.page:
        PAGE.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
