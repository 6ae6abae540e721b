"""Times the experts of an E layer, forward and backward: the loop, the grouped path, and the two kinds of products that it
chooses from, in turns.

python scripts/bench/moe_experts.py --threads 1 --json out.json

Every turn draws a new, uneven routing for each side. Exits with 1 where the median turn of the grouped path takes over 5
percent longer than that of the loop. docs/benchmarks/moe_experts.md says what came out.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid.train.process import keep_freed_memory
from nemohybrid_kernels.moe.grouped import expert_mlp_grouped
from nemohybrid_kernels.moe.products import GROUPED_MM, SEGMENTS
from nemohybrid_kernels.moe.reference import expert_mlp_torch

SLOWER = 1.05
"""Median of (grouped / loop) from which on the grouped path counts as slower; repeats differ by less."""


class Size(NamedTuple):
    """T tokens, D width of the experts' input, F inner width, E experts, K of them a token."""

    T: int
    D: int
    F: int
    E: int
    K: int


SIZES = [
    Size(2048, 128, 128, 8, 2),  # a layer of model=tiny_moe
    Size(2048, 32, 64, 32, 6),  # model=tiny_latent_mtp
    Size(2048, 512, 256, 8, 2),
    Size(2048, 512, 256, 128, 6),
    Size(512, 128, 64, 128, 6),  # 24 rows an expert
]
SIDES: dict[str, Callable[..., Tensor]] = {
    "loop": expert_mlp_torch,
    "grouped": expert_mlp_grouped,
    "grouped_mm": partial(expert_mlp_grouped, products=GROUPED_MM),
    "segments": partial(expert_mlp_grouped, products=SEGMENTS),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Time every size in both types, print a line for each, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    parser.add_argument("--turns", type=int, default=15, help="of each side (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write all seconds to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in a run: without it, half of the time goes to page faults
    print(f"{machine(options.threads)}\nmilliseconds, medians of {options.turns} turns; ratios are medians of turns")
    print(f"{'size':44}{'type':10}" + "".join(f"{name:>12}" for name in SIDES) + f"{'grouped/loop':>14}{'spread':>14}")
    runs, slower = [], []
    for size, dtype in product(SIZES, (torch.float32, torch.bfloat16)):
        seconds = in_turns(size, dtype, options.turns)
        ratios = [a / b for a, b in zip(seconds["grouped"], seconds["loop"], strict=True)]
        print(row(size, dtype, seconds, ratios), flush=True)
        runs.append({"size": size._asdict(), "dtype": str(dtype), "seconds": seconds})
        slower += [f"{size}, {dtype}"] if statistics.median(ratios) > SLOWER else []
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.threads), "runs": runs}) + "\n")
    print("\n".join(f"slower than the loop: {which}" for which in slower) or "nowhere slower than the loop")
    return 1 if slower else 0


def in_turns(size: Size, dtype: torch.dtype, turns: int) -> dict[str, list[float]]:
    """Seconds of every turn of every side, two turns to warm up left out.

    Each side has loads of its own: kernels that oneDNN compiled for the loads of one would serve the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    tensors = draw(size, dtype)
    for turn in range(turns + 2):
        for side in sorted(SIDES, key=lambda name: (turn + list(SIDES).index(name)) % len(SIDES)):
            routed = route(size, seed=len(SIDES) * turn + list(SIDES).index(side))
            start = clock()
            out = SIDES[side](tensors[0], *routed, *tensors[1:], activation=squared_relu)
            torch.autograd.grad(out, [*tensors, routed[1]], torch.ones_like(out))
            seconds[side].append(clock() - start)
    return {name: taken[2:] for name, taken in seconds.items()}


def clock() -> float:
    """With one thread the processor time, which the work of others disturbs less; with more the wall clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def draw(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """Input, up and down."""
    shapes = (size.T, size.D), (size.E, size.F, size.D), (size.E, size.D, size.F)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).mul(0.1).to(dtype).requires_grad_() for s in shapes]


def route(size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """Expert ids and weights [T, K] of softmax scores with a preference for some experts: loads differ about fourfold."""
    generator = torch.Generator().manual_seed(seed)
    liked = torch.randn(size.E, generator=generator) * 0.4
    scores = (torch.randn(size.T, size.E, generator=generator) + liked).softmax(-1)
    weights, ids = scores.topk(size.K)
    return ids, weights.requires_grad_()


def squared_relu(h: Tensor) -> Tensor:
    """relu(h)^2."""
    return F.relu(h).square()


def row(size: Size, dtype: torch.dtype, seconds: dict[str, list[float]], ratios: list[float]) -> str:
    """A line of the table."""
    name = ", ".join(f"{key}={value}" for key, value in size._asdict().items())
    times = "".join(f"{1000 * statistics.median(taken):>12.2f}" for taken in seconds.values())
    spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
    kind = str(dtype).removeprefix("torch.")
    return f"{name:44}{kind:10}{times}{statistics.median(ratios):>14.2f}{spread:>14}"


def machine(threads: int) -> str:
    """What the figures hold for."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {threads} threads; torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
