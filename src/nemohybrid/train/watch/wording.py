"""Numbers and lists in words."""

from collections.abc import Iterable
from itertools import groupby

_SHORT_S = 10.0


def seconds(value: float) -> str:
    """`3.2 s`, `65 s`."""
    return f"{value:.1f} s" if value < _SHORT_S else f"{value:.0f} s"


def ranks(numbers: Iterable[int]) -> str:
    """`rank 3`; `ranks 0-4, 6`; `no rank`."""
    ordered = sorted(set(numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    listed = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ordered) > 1 else ''} {listed}" if ordered else "no rank"
