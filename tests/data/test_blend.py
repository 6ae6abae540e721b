"""The order of a blend against its definition, near the beginning and far away."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.data.blend import Blend

WEIGHTS = st.lists(st.sampled_from([1, 2, 3, 7, 0.1, 0.25, 0.3, 0.333, 1e-3, 97.5]), min_size=1, max_size=6)
FAR = 10**15


def by_definition(weights: list[float], stop: int) -> list[tuple[int, int]]:
    """All samples up to more than enough of each corpus, sorted by their time."""
    times = [
        (Fraction(2 * index + 1) / (2 * Fraction(str(weight))), corpus, index)
        for corpus, weight in enumerate(weights)
        for index in range(stop)
    ]
    return [(corpus, index) for _, corpus, index in sorted(times)[:stop]]


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 60), length=st.integers(0, 60))
def test_a_slice_is_that_of_the_definition(weights, start, length):
    assert Blend(weights).positions(start, start + length) == by_definition(weights, start + length)[start:]


def test_the_order_of_seven_to_three_never_changes():
    assert [corpus for corpus, _ in Blend([0.7, 0.3]).positions(0, 10)] == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, FAR), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_slices_put_together_are_one_slice(weights, start, cuts):
    """So ranks, steps and restarts may cut as they like."""
    blend, edges = Blend(weights), [start, *sorted(start + cut for cut in cuts), start + 40]
    pieces = itertools.chain.from_iterable(blend.positions(*ends) for ends in itertools.pairwise(edges))
    assert list(pieces) == blend.positions(start, start + 40)


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, stop=st.integers(0, FAR))
def test_the_counts_are_exact_however_far(weights, stop):
    """Nothing that was taken has a later time than anything that was not: with the right sum, that is the definition."""
    blend = Blend(weights)
    counts = blend.counts(stop)
    assert sum(counts) == stop
    exact = [Fraction(str(weight)) for weight in weights]
    taken = [((2 * n - 1) / (2 * w), c) for c, (n, w) in enumerate(zip(counts, exact, strict=True)) if n]
    following = [((2 * n + 1) / (2 * w), c) for c, (n, w) in enumerate(zip(counts, exact, strict=True))]
    assert not taken or max(taken) < min(following)
    corpus, index = blend.positions(stop, stop + 1)[0]
    assert (min(following)[1], counts[corpus]) == (corpus, index)


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, stop=st.integers(0, FAR))
def test_every_corpus_is_close_to_its_share_at_any_moment(weights, stop):
    """The bound that the module states; for up to three corpora it is less than one sample."""
    blend = Blend(weights)
    for share, count in zip(blend.shares, blend.counts(stop), strict=True):
        assert abs(count - share * stop) <= Fraction(1, 2) + share * (len(weights) - 2) / 2


@pytest.mark.parametrize("scale", [1, 10, 0.001, 1_000_000])
def test_only_the_proportions_of_weights_count(scale):
    assert Blend([3 * scale, 1 * scale]).positions(0, 50) == Blend([3, 1]).positions(0, 50)


def test_a_decimal_weight_is_the_decimal_that_was_written():
    assert Blend([0.1, 0.2]).shares == [Fraction(1, 3), Fraction(2, 3)]


def test_one_corpus_comes_in_its_own_order():
    assert Blend([0.3]).positions(FAR, FAR + 3) == [(0, FAR), (0, FAR + 1), (0, FAR + 2)]
