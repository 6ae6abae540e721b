"""Sequence lengths that take turns."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.config.environment import DataSection
from nemohybrid.config.lengths import LengthPlan


def plan(lengths, longest=None):
    return LengthPlan.of(DataSection(lengths=lengths, sequence_length=longest or max(lengths or [256])))


def test_one_length_has_every_step():
    one = plan(None, 64)
    assert [one.at(step) for step in (1, 2, 1000)] == [64] * 3
    assert one.steps_before(1000, 64) == 999


def test_the_mix_of_a_published_run():
    """Nemotron 3 Ultra: 92 % of the steps at a million tokens, the others at 4096."""
    mixed = plan({1048576: 92, 4096: 8})
    steps = [mixed.at(step) for step in range(1, 1001)]
    assert steps.count(4096) == 80
    rare = [i for i, n in enumerate(steps) if n == 4096]
    assert {b - a for a, b in pairwise(rare)} == {12, 13}, "evenly, and not in a row"


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(1, 9), st.floats(0.01, 10, allow_nan=False), min_size=1, max_size=4),
    st.integers(1, 200),
)
def test_counts_are_those_of_the_steps_and_keep_to_the_shares(shares, last):
    lengths = plan(shares)
    steps = [lengths.at(step) for step in range(1, last + 1)]
    total = sum(shares.values())
    for length, share in shares.items():
        assert lengths.steps_before(last + 1, length) == steps.count(length)
        assert abs(steps.count(length) - last * share / total) <= len(shares)


@pytest.mark.parametrize(
    "lengths, word",
    [
        ("{0: 1}", "whole number above 0"),
        ("{8: 0}", "not a number above 0"),
        ("[8]", "no mapping"),
        ("{a: 1}", "the length 'a'"),
    ],
)
def test_what_is_no_mapping_of_lengths_is_said(lengths, word, complaint):
    assert word in complaint(f"data.lengths={lengths}")


def test_a_configuration_with_lengths(compose):
    config = compose("data.lengths={256: 0.75, 64: 0.25}", "data.sequence_length=256")
    assert LengthPlan.of(config.data).lengths[0][0] == 64
