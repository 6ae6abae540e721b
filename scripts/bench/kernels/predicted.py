"""Writes docs/benchmarks/kernels_predicted.md: what our kernels should take on an H200, from shapes alone.

python scripts/bench/kernels/predicted.py            # writes the page
python scripts/bench/kernels/predicted.py --check    # exits with 1 where the page is not what it would write

Nothing here was measured.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from cases import MAIN, Sizes, bar
from cases import grid as all_sizes
from counts import Count, Kernel, of_launch, of_mixer
from counts_mamba import mamba_ssm, minimum

from nemohybrid.plan.hardware import device
from nemohybrid_kernels.calls import CASES, Case, Mixer, run_mixer

PAGE = Path(__file__).parents[3] / "docs/benchmarks/kernels_predicted.md"
MEMORY, PRODUCTS = 0.9, 0.8
"""Shares of the data sheet's bytes/s and FLOP/s that the best kernels reach."""
H200 = device("H200")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is out of date; python {Path(__file__).name} writes it anew", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    tables = {
        INTRODUCTION: sums(MAIN),
        SIZES: grid(),
        OURS: of_passes(ours(MAIN)),
        OTHERS: others(),
        THEIRS: of_passes(mamba_ssm(MAIN, 256)),
    }
    return "\n".join([line for text, table in tables.items() for line in (text, *table)]) + "\n"


def ours(sizes: Sizes, recompute: bool = False) -> Count:
    """What `mamba2_mixer` launches on sm_90."""
    return of_mixer(Case("mixer", partial(run_mixer, Mixer(**vars(sizes), recompute=recompute))))


def seconds(kernels: Sequence[Kernel]) -> float:
    """One after the other, each bound by memory or by products."""
    return sum(kernel.seconds(MEMORY * H200.memory, PRODUCTS * H200.flops) for kernel in kernels)


SIDES = {
    "the least possible": minimum,
    "mamba-ssm, chunk 128": lambda sizes: mamba_ssm(sizes, 128),
    "mamba-ssm, chunk 256": lambda sizes: mamba_ssm(sizes, 256),
    "ours, recomputing": partial(ours, recompute=True),
    "ours": ours,
}


def sums(sizes: Sizes) -> list[str]:
    """A row for each side."""
    lines = [
        "| | MB forward | backward | GFLOP forward | backward | µs forward | backward | both |",
        "|---|" + "--:|" * 7,
    ]
    for name, count in SIDES.items():
        found = count(sizes)
        passes = found.forward, found.backward
        megabytes = [f"{sum(k.bytes for k in kernels) / 1e6:.0f}" for kernels in passes]
        flops = [f"{sum(k.flops for k in kernels) / 1e9:.0f}" for kernels in passes]
        times = [f"{1e6 * seconds(kernels):.0f}" for kernels in (*passes, found.both)]
        lines.append(f"| {name} | {' | '.join([*megabytes, *flops, *times])} |")
    return lines


def grid() -> list[str]:
    """A row for each size that has a bar: both passes."""
    lines = ["| sizes | mamba-ssm, µs | ours, µs | ratio | bar |", "|---|--:|--:|--:|--:|"]
    for sizes in sorted((of for of in all_sizes() if not of.packed), key=_order):
        theirs = min(seconds(mamba_ssm(sizes, chunk).both) for chunk in (128, 256))
        own = seconds(ours(sizes).both)
        lines.append(f"| {sizes} | {1e6 * theirs:.0f} | {1e6 * own:.0f} | {theirs / own:.2f} | {bar(sizes)} |")
    return lines


def _order(sizes: Sizes) -> tuple[int, ...]:
    return -sizes.heads, sizes.tokens, -sizes.groups, sizes.state


def of_passes(count: Count) -> list[str]:
    named = {"forward": count.forward, "backward": count.backward}
    return rows("pass", ((name, kernel) for name, kernels in named.items() for kernel in kernels))


def others() -> list[str]:
    """Of the cases of bf16 outside of the mixer, whose parts stand above."""
    apart = [case for case in CASES if case.name.split()[0] not in ("mixer", "conv", "ssd") and "fp32" not in case.name]
    return rows("call", ((case.name, of_launch(launch)) for case in apart for launch in case.launches(90)))


def rows(heading: str, named: Iterable[tuple[str, Kernel]]) -> list[str]:
    """A row for each launch."""
    lines = [f"| {heading} | kernel | MB | GFLOP | µs | bound by |", "|---|---|--:|--:|--:|---|"]
    for name, k in named:
        bound = "memory" if k.bytes / (MEMORY * H200.memory) >= k.flops / (PRODUCTS * H200.flops) else "products"
        flops = f"{k.flops / 1e9:.1f}" if k.flops else ""
        lines.append(f"| {name} | `{k.name}` | {k.bytes / 1e6:.1f} | {flops} | {1e6 * seconds([k]):.0f} | {bound} |")
    return lines


INTRODUCTION = f"""<!-- written by scripts/bench/kernels/predicted.py -->
# Predicted times of the kernels

What should the middle of a Mamba-2 layer, and what else we fuse, take on an H200, by counting alone?

**Nothing on this page was measured.** No GPU could be had yet by anybody who worked on these kernels. Here is what shapes and
source code say. [How kernels will be measured](kernels_method.md) has a page of its own, and so will what is measured.

`python scripts/bench/kernels/predicted.py` writes this page, and a test fails when it is out of date. Of every launch it counts
each element once that is read, and once that is written, and the matrix products; a test compares both with what Triton's
interpreter does. A kernel then takes as long as the slower of the two: with {MEMORY:.0%} of the H200's
{H200.memory / 1e12:.1f} TB/s and {PRODUCTS:.0%} of its {H200.flops / 1e12:.0f} bf16 TFLOP/s. Real kernels are slower: launches,
exponentials, waiting, and what caches do not hold are not counted, and the first weigh more where there is less to move. So
times are lower bounds, and a ratio of two of them says what is possible, not what will be.

## Sums

A layer of Nemotron-H-8B: 8192 tokens, 128 heads of 64, state 128, 8 groups, bf16. From the output of the first projection to
the normed y: convolution, time steps, scan and gated norm.
"""
SIZES = """
mamba-ssm is counted as version 2.3.2 with causal-conv1d, from its source; where its autotuner chooses, in its favour. Its Triton
kernels, run once in the interpreter at small sizes, moved within 3 % of these counts. "The least possible" is one kernel for each
pass that reads its inputs and writes its results once; no such kernel fits onto a multiprocessor. mamba-ssm makes convolution
and states again in the backward pass, as ours does with `kernels.mixer_recompute=true`: it then keeps 302 MB less here.

## All sizes

All that have a [bar](kernels_method.md#the-bars), forward and backward together; mamba-ssm with the better of chunks of 128 and
256 tokens. Packed documents add 4 bytes a token to some kernels, and change no ratio. Where a ratio lies below its bar, the bar
is met only if our kernels come closer to their bound than mamba-ssm's to theirs.
"""
OURS = """
## Kernels of the mixer

Recorded from our own launchers, with the tiles of sm_90. Sums of shares are computed by torch.
"""
OTHERS = """
## Other fused operators

The calls of `nemohybrid_kernels/calls.py` in bf16, forward and backward; the products beside them, of the experts and of the
logits, are torch's and not counted.
"""
THEIRS = """
## Kernels of mamba-ssm

With chunks of 256 tokens, its default.
"""

if __name__ == "__main__":
    sys.exit(main())
