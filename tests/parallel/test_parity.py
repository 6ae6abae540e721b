"""The proof: every layout equals one rank, gradient by gradient, and weight by weight after three steps.

Tolerances are shares of the largest entry of a tensor, in fp32; sums over ranks are in another order, and nothing else.
"""

import pytest
from layouts import Layout, compare

from nemohybrid_kernels import cross_entropy

TOLERANCE = 1e-5

LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(tensor=4),
    Layout(tensor=4, sequence=True),
    Layout(data=2),
    Layout(data=4, shard=4),
    Layout(data=4, shard=4, mode="shard_grad"),
    Layout(data=2, shard=2, every=True),
    Layout(data=4, shard=2, mode="hybrid"),
    Layout(tensor=2, data=2, shard=2),
    Layout(tensor=2, data=2, sequence=True),
    Layout(tensor=2, data=4, shard=2, sequence=True, mode="hybrid"),
    # stages of a pipeline
    Layout(pipeline=2),
    Layout(pipeline=2, schedule="gpipe", tensor=2),
    Layout(pipeline=4),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=2, virtual=2, data=2, shard=2),
    Layout(pipeline=2, data=2, shard=2, mode="shard_grad", schedule="gpipe"),
    Layout(pipeline=2, tensor=2, data=2, shard=2, sequence=True),
    Layout(pipeline=2, data=4, shard=2, mode="hybrid"),
    Layout(pipeline=4, data=2, shard=2, every=True),
    # experts on a grid of their own
    Layout(data=2, expert=2),
    Layout(data=4, expert=4),
    Layout(data=4, expert=2, room=1.0),
    Layout(data=2, expert_tensor=2),
    Layout(data=4, expert=2, expert_tensor=2),
    Layout(data=4, shard=4, expert=2),
    Layout(data=2, shard=2, expert=2, mode="shard_grad"),
    Layout(data=4, shard=2, expert=2, mode="hybrid"),
    Layout(tensor=2, sequence=True, expert=2),
    Layout(tensor=2, data=2, sequence=True, expert=4),
    Layout(tensor=4, sequence=True, expert=2, expert_tensor=1),
    Layout(tensor=2, data=2, shard=2, sequence=True, expert_tensor=1),
    # tokens of a row on several ranks
    Layout(context=2, method="all_to_all"),
    Layout(context=2, method="ring+states"),
    Layout(context=4, method="all_to_all"),
    Layout(context=4, method="ring+states"),
    Layout(context=2, data=2, shard=4, method="all_to_all+states"),
    Layout(context=2, tensor=2, sequence=True, method="ring+all_to_all"),
    Layout(context=2, tensor=2, sequence=True, expert=4, method="ring+states"),
    Layout(context=4, tensor=2, sequence=True, expert=8, method="ring+states"),
    Layout(context=2, pipeline=2, method="ring+states"),
    Layout(context=2, pipeline=2, data=2, expert=4, method="all_to_all"),
    Layout(context=2, data=2, shard=2, mode="hybrid", method="ring+states"),
    # all of it
    Layout(pipeline=2, data=2, expert=2),
    Layout(pipeline=2, virtual=2, tensor=2, sequence=True, expert=2),
    Layout(pipeline=2, data=4, shard=4, expert=2, expert_tensor=2),
    Layout(pipeline=2, tensor=2, data=2, shard=2, sequence=True, expert=4, room=2.0),
    Layout(pipeline=4, data=2, expert=2, schedule="gpipe"),
]


MODELS = ["every_option", "latent"]
CASES = [
    pytest.param(layout, model, marks=[] if number % 2 == first else [pytest.mark.slow], id=f"{layout}-{model}")
    for number, layout in enumerate(LAYOUTS)
    for first, model in enumerate(MODELS)
]
"""Every layout with either model; with the second of them only where slow tests run too."""


@pytest.mark.parametrize("layout, model", CASES)
def test_every_gradient_and_weight_equals_one_rank(layout, model):
    """Packed rows; recomputed layers in every other case of a model."""
    recompute = "layer" if LAYOUTS.index(layout) // 2 % 2 else "none"
    comparison = compare(layout, model, recompute=recompute)
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))
    assert len(comparison.tensors) > 80


IN_PLACE = [Layout(tensor=2), Layout(tensor=4, sequence=True), Layout(context=4, method="ring+states")]
"""Ranks that share the tokens of a row, or its width."""


@pytest.mark.parametrize("layout", IN_PLACE, ids=str)
def test_a_tied_vocabulary_and_a_global_balance_equal_one_rank(layout):
    """Data ranks know other loads than one rank at the same moment (docs/moe.md), so the ranks here share the tokens."""
    comparison = compare(layout, "tied", packed=False)
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))


@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=4, sequence=True), Layout(data=4, shard=4), Layout(tensor=2, sequence=True, context=2)],
    ids=str,
)
def test_visits_in_turns_and_ranks_whose_rows_are_padding_equal_one_rank(layout):
    comparison = compare(layout, "forced", steps=2)
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))


@pytest.mark.parametrize(
    "layout",
    [Layout(data=2, shard=2), Layout(data=2, shard=2, mode="shard_grad"), Layout(tensor=2, data=2, sequence=True)],
    ids=str,
)
def test_a_tied_vocabulary_is_shared_by_data_ranks_as_one(layout):
    """And the gradient of a bias of keys, which is zero but for rounding, is no fault."""
    comparison = compare(layout, "tied_by_sequence", recompute="layer")
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))
    key_bias = comparison.tensors["gradient.mtp.0.layers.0.mixer.qkv.k.bias"]
    assert key_bias.scale < comparison.floors()["gradient"]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, shard=2),
        Layout(tensor=4, sequence=True),
        Layout(pipeline=2, data=2, shard=2, mode="shard_grad"),
    ],
    ids=str,
)
def test_a_loss_that_never_holds_all_logits_equals_one_rank_that_does(layout):
    """It keeps the matrix for its backward pass, which FSDP must not have cut again by then, and which MTP uses too."""
    comparison = compare(layout, "latent", recompute="layer", before=without_all_logits)
    assert not comparison.faults(TOLERANCE), "\n".join(comparison.faults(TOLERANCE))


def without_all_logits():
    def held(*_, **__):
        raise AssertionError("all logits were held")

    cross_entropy._slower, cross_entropy._plain = (lambda device: None), held
