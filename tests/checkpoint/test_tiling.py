"""What ranks hold is a whole tensor or the fault is told: exactly where something is missing or held twice."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.checkpoint.tiling import Held, Ranges, overlap, volume

PINWHEEL = [((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1)), ((1, 2), (1, 2))]


def held(shape: tuple[int, ...], *boxes: Ranges) -> Held:
    """One box a rank."""
    tensor = Held(shapes={shape: 0})
    for rank, box in enumerate(boxes):
        tensor.add(rank, torch.float32, tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
    return tensor


def values_of(box: Ranges) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(*ends) for ends in box)))


@st.composite
def boxes_and_shape(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Ranges]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    sides = [
        st.integers(0, size - 1).flatmap(lambda a, n=size: st.tuples(st.just(a), st.integers(a, n))) for size in shape
    ]
    return shape, draw(st.lists(st.tuples(*sides), min_size=1, max_size=5))


def values_in(text: str) -> set[tuple[int, ...]]:
    """The values in `[0:2, 1:3]`."""
    begins_and_ends = (tuple(map(int, side.split(":"))) for side in text.strip("[]").split(", "))
    return values_of(tuple(begins_and_ends))


@settings(max_examples=150, deadline=None)
@given(boxes_and_shape())
def test_any_boxes_are_judged_as_counting_every_value_judges_them(case):
    shape, boxes = case
    counted = [value for box in dict.fromkeys(boxes) for value in values_of(box)]
    missing = values_of(tuple((0, size) for size in shape)) - set(counted)
    fault = held(shape, *boxes).fault("w")
    if len(counted) > len(set(counted)):
        assert fault is not None
        assert fault.endswith("overlap")
    elif missing:
        assert fault is not None
        place, count = fault.removeprefix("no rank holds w").split(": ")
        assert values_in(place)
        assert values_in(place) <= missing
        assert count == f"{len(missing)} of {math.prod(shape)} values are missing"
    else:
        assert fault is None


@settings(max_examples=150, deadline=None)
@given(boxes_and_shape())
def test_boxes_overlap_when_they_share_a_value(case):
    full = [box for box in case[1] if volume(box)]
    for one, other in itertools.combinations(full, 2):
        assert overlap(one, other) == bool(values_of(one) & values_of(other)), f"{one} and {other}"


def test_boxes_that_no_straight_cut_parts_are_a_tiling_in_any_order():
    for order in itertools.permutations(PINWHEEL):
        assert held((3, 3), *order).fault("w") is None, f"{order} was refused"


def test_a_scalar_is_whole_with_one_box_and_its_replicas():
    assert held((), (), ()).fault("w") is None
    assert held(()).fault("w") == "no rank holds any of w"


def test_an_empty_box_counts_for_nothing_and_an_empty_tensor_needs_one():
    assert held((2,), ((0, 0),), ((0, 2),)).fault("w") is None
    overlapping = held((4,), ((2, 2),), ((0, 3),), ((1, 4),))
    assert overlapping.fault("w") == "w[0:3] of rank 1 and w[1:4] of rank 2 overlap"
    assert held((2,), ((0, 0),)).fault("w") == "no rank holds w[0:2]: 2 of 2 values are missing"
    assert held((0, 3), ((0, 0), (0, 3))).fault("w") is None
    assert held((0, 3)).fault("w") == "no rank holds any of w"
