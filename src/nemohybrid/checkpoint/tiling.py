"""Whether what all ranks hold of a tensor is that tensor: one shape, one dtype, and boxes that tile it.

DCP asks this as well, but too late and not always: it first drops a box that begins where another rank's begins, whatever
its size, it takes a lone rank's word that its boxes are all, and before torch 2.13 its error names no tensor.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from nemohybrid.checkpoint.metadata import Shape

Ranges = tuple[tuple[int, int], ...]
"""Where a box begins and ends, an axis each. A scalar is the box ()."""


@dataclass
class Held:
    """What the ranks hold of one tensor: every shape, dtype and box there is, with the first rank that has it."""

    shapes: dict[Shape, int] = field(default_factory=dict)
    dtypes: dict[torch.dtype, int] = field(default_factory=dict)
    boxes: dict[Ranges, int] = field(default_factory=dict)

    def add(self, rank: int, dtype: torch.dtype, offsets: Shape, sizes: Shape) -> None:
        """Count in a box of a rank; the same box on several ranks is one."""
        self.dtypes.setdefault(dtype, rank)
        if 0 not in sizes:
            box = tuple((begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
            self.boxes.setdefault(box, rank)

    def fault(self, name: str) -> str | None:
        """Why this is not a whole tensor, or None."""
        if len(self.shapes) > 1:
            return f"{name} has shape {both({str(list(shape)): rank for shape, rank in self.shapes.items()})}"
        if len(self.dtypes) > 1:
            return f"{name} is {both(self.dtypes)}"
        if not self.dtypes:
            return f"no rank holds any of {name}"
        (shape,) = self.shapes
        return self.tiling_fault(name, shape)

    def tiling_fault(self, name: str, shape: Shape) -> str | None:
        """Where the boxes overlap, or what they leave out of a tensor of this shape; None where they tile it."""
        free = uncovered(shape, self.boxes)
        covered = math.prod(shape) - sum(map(volume, free))
        if sum(map(volume, self.boxes)) > covered:
            one, other = next(pair for pair in itertools.combinations(self.boxes, 2) if overlap(*pair))
            told = [f"{written(name, box)} of rank {self.boxes[box]}" for box in (one, other)]
            return f"{' and '.join(told)} overlap"
        missing = f"{math.prod(shape) - covered} of {math.prod(shape)} values are missing"
        return f"no rank holds {written(name, min(free))}: {missing}" if free else None


def uncovered(shape: Shape, boxes: dict[Ranges, int]) -> list[Ranges]:
    """Boxes that together are what `boxes` leave out of a tensor.

    Sorted boxes are taken away one after the other: of a regular cut, what is left is then never more than a few.
    """
    whole = tuple((0, size) for size in shape)
    free = [whole] if volume(whole) else []
    for box in sorted(boxes):
        free = [part for region in free for part in without(region, box)]
    return free


def without(region: Ranges, box: Ranges) -> list[Ranges]:
    """What of `region` lies outside `box`: for each axis at most one box before it and one behind it."""
    if not overlap(region, box):
        return [region]
    outside: list[Ranges] = []
    for axis, ((begin, end), (first, last)) in enumerate(zip(region, box, strict=True)):
        before, behind = region[:axis], region[axis + 1 :]
        outside += [(*before, cut, *behind) for cut in ((begin, first), (last, end)) if cut[0] < cut[1]]
        region = (*before, (max(begin, first), min(end, last)), *behind)
    return outside


def overlap(one: Ranges, other: Ranges) -> bool:
    """Whether two boxes, none of them empty, have something in common."""
    return all(a < end and b < stop for (a, stop), (b, end) in zip(one, other, strict=True))


def volume(box: Ranges) -> int:
    """How many values a box has."""
    return math.prod(end - begin for begin, end in box)


def written(name: str, box: Ranges) -> str:
    """A box as Python indexes it: `weight[0:2, 6:8]`."""
    return f"{name}[{', '.join(f'{begin}:{end}' for begin, end in box)}]" if box else name


def both(ranks: dict[Any, int]) -> str:
    """The first two of several values, each with the first rank that has it."""
    return " and ".join(f"{value} on rank {rank}" for value, rank in itertools.islice(ranks.items(), 2))
