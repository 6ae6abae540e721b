"""Finds the fastest configuration of each kernel on this GPU, and writes it into the operator's configs.json.

python scripts/bench/tune_kernels.py                          # every kernel: hours
python scripts/bench/tune_kernels.py --only ssd_scan --dry-run
python scripts/bench/tune_kernels.py --rehearse --only norm   # the same on a CPU, on tiny tensors and three candidates each

A candidate of tuning_spaces.py takes part if it compiles without a fault (see compile_kernels.py) and its results are those of
the current configuration. The rest take turns in random order, round after round; their times are medians over the rounds. One
replaces the current one if it takes 2 percent less over the cases that lead to this line of the table (at most three of
nemohybrid_kernels/calls.py). Lines of other architectures stay as they are. Tests then want a new page of resources:
python scripts/bench/compile_kernels.py --page.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from config_files import PACKAGE, write
from torch import Tensor
from tuning_spaces import candidates

from nemohybrid_kernels.ahead_of_time import compilation_of, compile_launch, resources_of
from nemohybrid_kernels.calls import (
    BF16,
    CASES,
    FP32,
    Case,
    Experts,
    Maker,
    Mixer,
    Results,
    of_mixers,
    run_conv,
    run_experts,
    run_loss,
    run_norm,
    run_scan,
)
from nemohybrid_kernels.launching import ARCHITECTURES, Config, Launch, architecture, compiler_options, recording, table

GAIN = 0.98
"""A new configuration must take at most this share of the time of the current one: repeats differ by a percent."""

TOLERANCE = {BF16: 2e-2, FP32: 1e-3}
"""Distance of results, in the Euclidean norm and relative to the current ones: sums are cut elsewhere, states rounded."""

MOST_CASES = 3
TINY = Mixer(tokens=40, heads=2, width=16, state=16, groups=1)
REHEARSED = [
    Case("norm tiny", partial(run_norm, 64, FP32, 8)),
    *of_mixers("conv", run_conv, tiny=TINY),
    *of_mixers("ssd", run_scan, tiny=TINY),
    Case("experts tiny", partial(run_experts, Experts(8, 32, 48, 2, FP32))),
    Case("loss tiny", partial(run_loss, 8, 200, FP32)),
]


@dataclass(frozen=True)
class Line:
    """A line of the table, and the cases that lead to it."""

    architecture: int
    kernel: str
    place: int
    cases: list[Case] = field(repr=False)

    @property
    def entry(self) -> dict[str, Any]:
        return table()[f"sm_{self.architecture}"][self.kernel][self.place]

    @property
    def config(self) -> Config:
        return Config(self.entry["tiles"], self.entry["warps"], self.entry["stages"])

    def set_to(self, config: Config) -> None:
        self.entry.update(tiles=dict(config.tiles), warps=config.warps, stages=config.stages)

    @contextmanager
    def holding(self, config: Config) -> Iterator[None]:
        before = self.config
        self.set_to(config)
        try:
            yield
        finally:
            self.set_to(before)

    def launches(self, config: Config) -> list[Launch]:
        """All that the line concerns, recorded."""
        with self.holding(config):
            found = [launch for case in self.cases for launch in case.launches(self.architecture)]
        return [launch for launch in found if self.concerns(launch)]

    def concerns(self, launch: Launch) -> bool:
        """Its own launches; all of the operator where the line is of no kernel."""
        return launch.kernel.__name__ == self.kernel or (
            self.kernel == "ssd_chunk" and launch.kernel.__name__[:4] == "ssd_"
        )


@dataclass(frozen=True)
class Machine:
    """How to run and time things: on the GPU, or in a rehearsal."""

    device: torch.device
    rehearses: bool

    def make(self) -> Maker:
        """Makes the same tensors as every other."""
        return Filled(torch.Generator(self.device).manual_seed(0), self.device)

    def run(self, line: Line, config: Config, case: Case) -> tuple[Results, float]:
        """All results of a case under a configuration, and the milliseconds of the launches that the line concerns."""
        with line.holding(config), recording(line.architecture, runs=True) as launches:
            results = case.run(self.make())
        return results, sum(self.milliseconds(launch) for launch in launches if line.concerns(launch))

    def milliseconds(self, launch: Launch) -> float:
        """Of a launch that has run, done again: on its results where it writes over what it read, which takes as long."""
        again = partial(
            launch.kernel[launch.grid], **launch.arguments, **launch.config.tiles, **compiler_options(launch.config)
        )
        if not self.rehearses:
            from triton.testing import do_bench  # asks for a GPU

            return float(do_bench(again, warmup=5, rep=30, return_mode="median"))
        began = time.perf_counter()
        again()
        return (time.perf_counter() - began) * 1000

    def fault(self, line: Line, config: Config) -> str | None:
        """Why a configuration cannot be shipped, whatever its speed."""
        if self.rehearses:
            return None
        faults = (_fault(launch, line.architecture) for launch in line.launches(config))
        return next((fault for fault in faults if fault), None)

    def compile_ahead(self, line: Line, tried: Iterable[Config]) -> None:
        """On all processors, to be found in the folder of results. What does not compile is found out again later."""
        if self.rehearses:
            return
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            for config in tried:
                for launch in line.launches(config):
                    pool.submit(resources_of, compilation_of(launch, line.architecture))


def _fault(launch: Launch, architecture: int) -> str | None:
    try:
        resources = compile_launch(launch, architecture)
    except Exception as error:  # whatever the compiler does not like
        return f"it does not compile: {str(error).splitlines()[:1]}"
    return next(iter(resources.faults(architecture, compilation_of(launch, architecture).dtype)), None)


@dataclass
class Filled:
    """A `Maker` of tensors with entries."""

    generator: torch.Generator
    device: torch.device

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, like: str) -> Tensor:
        if like == "starts":
            return self._starts(shape)
        if like == "order":
            return torch.randperm(shape[0], generator=self.generator, device=self.device)
        if like == "labels":
            return torch.randint(2**17, shape, generator=self.generator, device=self.device)
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        if like == "steps":
            drawn = torch.nn.functional.softplus(drawn - 4)
        if like == "rates":
            drawn = -1 - 4 * drawn.abs()
        return drawn.to(dtype)

    def _starts(self, shape: tuple[int, ...]) -> Tensor:
        """Documents of some 1000 tokens."""
        from nemohybrid_kernels.documents import document_starts

        begins = torch.rand(shape, generator=self.generator, device=self.device) < 1e-3
        return document_starts(begins.cumsum(1))


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    machine = _machine(args.rehearse)
    number = architecture(machine.device)
    changes: dict[tuple[str, int], Config] = {}
    for line in lines(number, args.only, REHEARSED if args.rehearse else CASES):
        best = tune(line, machine, random.Random(args.seed), args.rounds)
        if best != line.config:
            line.set_to(best)  # the lines that follow are tuned beside it
            changes[line.kernel, line.place] = best
    if not args.dry_run:
        for file in write(args.into, number, changes):
            print(f"wrote {file}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of a kernel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--into", type=Path, help="the folder of the operators; of a rehearsal none by default")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions on the CPU")
    args = parser.parse_args(arguments)
    args.dry_run |= args.rehearse and args.into is None
    args.into = args.into or PACKAGE
    return args


def _machine(rehearses: bool) -> Machine:
    if rehearses:
        return Machine(torch.device("cpu"), rehearses=True)
    if not torch.cuda.is_available():
        sys.exit("Tuning needs a CUDA GPU, and there is none. --rehearse goes through the motions on the CPU.")
    major, minor = torch.cuda.get_device_capability()
    if major * 10 not in ARCHITECTURES or (major < 10 and minor):
        sys.exit(f"The table has no column of its own for sm_{major}{minor}; it has {ARCHITECTURES}.")
    return Machine(torch.device("cuda"), rehearses=False)


def lines(number: int, only: str, cases: Sequence[Case]) -> Iterator[Line]:
    """Those of an architecture, the length of chunks before what depends on it. Those that no case leads to are named."""
    entries = {case.name: case.launches(number).entries for case in cases}
    for kernel, found in table()[f"sm_{number}"].items():
        for place in range(len(found)):
            leading = [case for case in cases if place in entries[case.name].get(kernel, [])]
            if only not in kernel:
                continue
            if leading:
                yield Line(number, kernel, place, leading[:MOST_CASES])
            else:
                print(f"{kernel} {found[place].get('when', 'else')}: no case leads to it")


Trial = Callable[[Config, Case], tuple[Results, float]]


def tune(line: Line, machine: Machine, order: random.Random, rounds: int) -> Config:
    """The best configuration, which is the current one unless another is clearly better."""
    print(f"{line.kernel} {line.entry.get('when', 'else')}, now {_text(line.config)}", flush=True)
    tried = list(candidates(line.kernel, line.config))
    tried = tried[:3] if machine.rehearses else tried
    sound = []
    machine.compile_ahead(line, tried)
    for config in tried:
        if fault := machine.fault(line, config):
            print(f"  {_text(config)}: {fault}")
        else:
            sound.append(config)
    return fastest(sound, line.config, line.cases, partial(machine.run, line), order, rounds)


def fastest(
    tried: Sequence[Config], current: Config, cases: Sequence[Case], trial: Trial, order: random.Random, rounds: int
) -> Config:
    """Of those that agree with the current one, by the mean over cases of the share of its time.

    The current one is timed even if it is not among `tried`, for a fault; then the fastest takes its place, however fast.
    """
    wanted = {case.name: trial(current, case)[0] for case in cases}
    sound = [it for it in tried if agrees(it, cases, wanted, trial)]
    times = in_turns([current, *(it for it in sound if it != current)], cases, trial, order, rounds)
    now, shares = times[_text(current)], {}
    for config in sound:
        of = times[_text(config)]
        shares[_text(config)] = statistics.geometric_mean(of[name] / now[name] for name in of)
        print(f"  {_text(config)}: {shares[_text(config)]:.3f} of the time", flush=True)
    best = min(sound, key=lambda it: shares[_text(it)], default=current)
    return best if current not in sound or shares[_text(best)] <= GAIN else current


def agrees(config: Config, cases: Sequence[Case], wanted: Mapping[str, Results], trial: Trial) -> bool:
    """This also compiles it, so that no turn does."""
    for case in cases:
        try:
            got = trial(config, case)[0]
        except Exception as error:  # a launch that the driver refuses is no reason to lose the others
            print(f"  {_text(config)}: {case.name} does not run: {error}")
            return False
        for place, (result, expected) in enumerate(zip(got, wanted[case.name], strict=True)):
            if (error := distance(result, expected)) > TOLERANCE[result.dtype]:
                print(f"  {_text(config)}: result {place} of {case.name} is off by {error:.1e}")
                return False
    return True


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm. Infinite for what is not a number."""
    error = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)
    return float(error.nan_to_num(nan=torch.inf))


def in_turns(
    tried: Sequence[Config], cases: Sequence[Case], trial: Trial, order: random.Random, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by configuration and case."""
    taken: dict[str, dict[str, list[float]]] = {_text(it): {case.name: [] for case in cases} for it in tried}
    for _ in range(rounds):
        turns = [(config, case) for config in tried for case in cases]
        order.shuffle(turns)
        for config, case in turns:
            taken[_text(config)][case.name].append(trial(config, case)[1])
    return {name: {case: statistics.median(ms) for case, ms in of.items()} for name, of in taken.items()}


def _text(config: Config) -> str:
    tiles = ", ".join(f"{name} {value}" for name, value in config.tiles.items())
    return f"{tiles}, {config.warps} warps, {config.stages} stages"


if __name__ == "__main__":
    sys.exit(main())
