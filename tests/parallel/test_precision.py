"""Recipes under parallel layouts: equal to one rank where ranks quantize what one rank does, and near it elsewhere.

Equal (1e-5, as without a recipe): data ranks, weights that are cut over them, stages of a pipeline, and tensor and context
ranks, which exchange the largest of what they hold parts of. Random bits are those of the rank, so recipes that round at random
are equal in a pipeline alone. Near (by less than the recipe is off from fp32): tensor ranks that draw or choose by themselves,
and experts on other ranks, who get other tokens at a time than on one.
"""

import statistics

import pytest
from layouts import Layout, compare, one_rank

from nemohybrid.train.parity import Observation

MODEL, STEPS = "blocks", 2
EQUAL = {
    "fp8_current": [Layout(tensor=2, sequence=True), Layout(data=2, shard=2), Layout(context=2, method="all_to_all")],
    "fp8_block": [Layout(data=2, expert=2)],
    "mxfp8": [Layout(tensor=2), Layout(data=2, expert=2)],
    "nvfp4_no_sr": [Layout(tensor=2, sequence=True), Layout(data=4, shard=2, mode="hybrid")],
    "nvfp4": [Layout(pipeline=2), Layout(pipeline=2, schedule="gpipe")],
    "fp8_delayed": [Layout(pipeline=2), Layout(tensor=2, data=2)],
}
ON_A_BORDER = 4
"""Tensors of a comparison, of which a gradient and its weight are two."""
OF_ONE_NUMBER = 1e-2
"""The share of a gradient's largest entry that one rounding of 4 bits may change."""
NEAR = {
    "fp8_current": [Layout(data=2, expert=2)],
    "nvfp4": [Layout(tensor=2, sequence=True), Layout(data=2, shard=2)],
    "mor": [Layout(tensor=2)],
}


@pytest.mark.parametrize(
    "recipe, layout", [(recipe, layout) for recipe, layouts in EQUAL.items() for layout in layouts], ids=str
)
def test_ranks_that_quantize_what_one_does_equal_it(recipe, layout):
    """Layers are computed again, which draws the same bits.

    Sums are in another order than on one rank, so a number on a border of the format may fall to its other side: which ones do
    depends on the CPU's products. One does to a row of a gradient what the format does to a number, and to no other tensor
    than its weight.
    """
    comparison = compare(layout, MODEL, STEPS, recompute="layer", recipe=recipe)
    off = comparison.faults(1e-5)
    assert len(off) <= ON_A_BORDER, "\n".join(off)
    assert not comparison.faults(OF_ONE_NUMBER), "\n".join(off)
    assert len(comparison.tensors) > 10 * ON_A_BORDER


def off(run: Observation, wanted: Observation) -> float:
    """The median over gradients of the distance, a share of the largest entry."""
    errors = [
        ((tensor - wanted.tensors[name]).abs().max() / wanted.tensors[name].abs().max()).item()
        for name, tensor in run.tensors.items()
        if name.startswith("gradient")
    ]
    return statistics.median(errors)


@pytest.mark.parametrize(
    "recipe, layout", [(recipe, layout) for recipe, layouts in NEAR.items() for layout in layouts], ids=str
)
def test_others_are_nearer_to_one_rank_than_that_is_to_fp32(recipe, layout):
    comparison = compare(layout, MODEL, STEPS, recipe=recipe)
    assert not comparison.failure, comparison.failure
    found = [each.error / each.scale for name, each in comparison.tensors.items() if name.startswith("gradient")]
    one = one_rank(MODEL, 4, STEPS, True, recipe)
    assert 1e-4 < statistics.median(found) < off(one, one_rank(MODEL, 4, STEPS))
