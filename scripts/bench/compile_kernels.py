"""Compiles the shipped kernels for GPUs that are not there, and prints what each takes of them.

python scripts/bench/compile_kernels.py                                 # all cases, sm_80, sm_90 and sm_100
python scripts/bench/compile_kernels.py --only conv --arch 90           # cases or kernels with "conv" in their names
python scripts/bench/compile_kernels.py --only ssd_scan --arch 90 --set ssd_scan.ROWS=64 --set ssd_scan.warps=8

Exits with 1 where a kernel spills registers, takes too much shared memory, or lost its tensor-core instructions. Results are
kept (NEMOHYBRID_COMPILED says where), so only what changed is compiled again.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

os.environ.pop("TRITON_INTERPRET", None)

from nemohybrid_kernels.ahead_of_time import Compilation, Resources, compilation_of, resources_of
from nemohybrid_kernels.launching import ARCHITECTURES, Launch, table
from nemohybrid_kernels.shipped import CASES

COLUMNS = "{:<24} {:>4} {:>5} {:<34} {:>5} {:>6} {:>5} {:>11} {:>7} {:>5} {:>6} {:>8} {:>7}  {}"

HEADINGS = "kernel arch type tiles warps stages regs spills shared dots wgmma tcgen05 mma case".split()  # noqa: SIM905


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    for text in args.set:
        override(text)
    compilations, cases = collect(args.only, args.arch)
    print(COLUMNS.format(*HEADINGS))
    failed, began = 0, time.perf_counter()
    for key, resources in compiled(compilations, args.processes):
        failed += _print(compilations[key], resources, cases[key])
    print(f"{len(compilations)} binaries, {failed} not to be shipped, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of a case or of a kernel")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, nargs="+", default=ARCHITECTURES)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KERNEL.WHAT=NUMBER", help="a tile, warps or stages"
    )
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args(arguments)


def override(text: str) -> None:
    """KERNEL.WHAT=NUMBER, in every entry of that kernel on every architecture."""
    path, _, number = text.partition("=")
    kernel, _, what = path.partition(".")
    for kernels in table().values():
        for entry in kernels[kernel]:
            where = entry if what in ("warps", "stages") else entry["tiles"]
            if what not in where:
                sys.exit(f"{kernel} has no {what}; it has warps, stages, {', '.join(entry['tiles'])}")
            where[what] = int(number)


def collect(only: str, architectures: Sequence[int]) -> tuple[dict[str, Compilation], dict[str, str]]:
    """By key: what is to be compiled, each binary once, and the first case that wants it."""
    compilations: dict[str, Compilation] = {}
    cases: dict[str, str] = {}
    for architecture in architectures:
        for case in CASES:
            for launch in case.launches(architecture):
                if only in case.name or only in launch.kernel.__name__:
                    _add(compilations, cases, case.name, launch, architecture)
    return compilations, cases


def _add(
    compilations: dict[str, Compilation], cases: dict[str, str], case: str, launch: Launch, architecture: int
) -> None:
    compilation = compilation_of(launch, architecture)
    key = compilation.key
    compilations.setdefault(key, compilation)
    cases.setdefault(key, case)


def compiled(compilations: dict[str, Compilation], processes: int) -> Iterator[tuple[str, Resources | Exception]]:
    """In order, as they come."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {key: pool.submit(resources_of, compilation) for key, compilation in compilations.items()}
        for key, future in futures.items():
            yield key, future.exception() or future.result()  # type: ignore[misc]


def _print(compilation: Compilation, found: Resources | Exception, case: str) -> bool:
    """A line, and whether it is a bad one."""
    tiles = ",".join(f"{name}={value}" for name, value in tiles_of(compilation).items())
    start = (
        compilation.name,
        compilation.architecture,
        compilation.dtype,
        tiles,
        compilation.config.warps,
        compilation.config.stages,
    )
    if isinstance(found, Exception):
        print(
            COLUMNS.format(*start, *"-------", case), f"  DOES NOT COMPILE: {str(found).splitlines()[:1]}", flush=True
        )
        return True
    spills = f"{found.spill_stores}/{found.spill_loads}"
    counts = (found.instructions[name] for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync"))
    faults = found.faults(compilation.architecture, compilation.dtype)
    line = COLUMNS.format(*start, found.registers, spills, found.shared, found.dots, *counts, case)
    print(line, "".join(f"\n    {fault}" for fault in faults), flush=True)
    return bool(faults)


def tiles_of(compilation: Compilation) -> dict[str, int]:
    """The constexpr arguments in capitals that are numbers: tiles and widths."""
    names = list(compilation.signature)
    constants = {names[path[0]]: value for path, value in compilation.constants.items()}
    return {name: value for name, value in constants.items() if name.isupper() and type(value) is int}


if __name__ == "__main__":
    sys.exit(main())
