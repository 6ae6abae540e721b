"""Timing of sides that take turns: whatever slows the machine for a while slows all of them. And of single kernels."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
ROUND_S = 0.01
"""A turn repeats its call until it lasts about so long: starting and stopping a clock then costs nothing."""
MOST_REPEATS = 200
FLUSHED_BYTES = 2**28
"""Read to have nothing else in the L2 cache, which is 50 MB on an H100 or H200 and 126 MB on a B200."""
SLEEP_CYCLES = 20_000_000
"""Some 10 ms, in which the host queues all rounds: between a kernel and the clocks beside it the device then never waits."""


def device_for(rehearse: bool) -> torch.device:
    """Where a benchmark runs; it ends here, with a message, where there is no GPU."""
    if rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("This measures a CUDA GPU, and torch finds none. --rehearse goes through the motions on the CPU.")
    return torch.device("cuda")


@dataclass(frozen=True)
class Times:
    """Seconds of one call, of each turn."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def seconds_of(call: Call, device: torch.device, repeats: int) -> float:
    """Of one call, on average over `repeats` that follow each other as in a model: the host runs ahead of the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def in_turns(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, Times]:
    """Every side once a round, each round beginning with another one. All must have run before: compiled, and tuned."""
    names, repeats = list(calls), {}
    for name, call in calls.items():
        repeats[name] = max(1, min(MOST_REPEATS, round(ROUND_S / seconds_of(call, device, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            seconds[name].append(seconds_of(calls[name], device, repeats[name]))
    return {name: Times(taken) for name, taken in seconds.items()}


def alone(call: Call, device: torch.device, rounds: int) -> Times:
    """One call a round, each finding nothing of its tensors in the L2 cache. It must have run before."""
    if device.type != "cuda":
        return Times([seconds_of(call, device, 1) for _ in range(rounds)])
    other = torch.zeros(FLUSHED_BYTES // 4, device=device)
    clocks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SLEEP_CYCLES)
    for begin, end in clocks:
        other.sum()  # read, not written: nothing is left to be written back while the kernel runs
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return Times([begin.elapsed_time(end) / 1000 for begin, end in clocks])


def ratios(slower: Times, faster: Times) -> list[float]:
    """Of the turns of each round."""
    return [a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)]
