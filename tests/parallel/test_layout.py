"""What a parameter is made of."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemohybrid.errors import ConfigError
from nemohybrid.model import init
from nemohybrid.parallel.layout import Box, ParamLayout, Piece, Shard, layout_of, logical_name, logical_views, parameter


def piece(name: str, *shape: int) -> Piece:
    return Piece(name, shape, lambda generator, shape: torch.zeros(shape))


def test_views_are_the_pieces_in_order_and_write_through():
    layout = ParamLayout((piece("q", 4, 3), piece("k", 2, 3)))
    tensor = torch.arange(18.0).view(6, 3)
    views = {p.name: v for p, v in layout.views(tensor)}
    assert torch.equal(views["q"], tensor[:4])
    assert torch.equal(views["k"], tensor[4:])
    views["k"].zero_()
    assert tensor[4:].count_nonzero() == 0


def test_a_parameter_carries_its_layout_and_is_fp32():
    weight = parameter(piece("gate", 5, 3), piece("up", 5, 3))
    assert weight.shape == layout_of(weight).shape == (10, 3)
    assert weight.dtype == torch.float32
    assert weight.requires_grad


def test_a_parameter_without_a_layout_is_our_mistake():
    with pytest.raises(AssertionError, match=r"without parallel\.layout\.parameter"):
        layout_of(torch.nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize(
    ("parameter_name", "piece_name", "expected"),
    [
        ("layers.0.mixer.in_proj.weight", "z", "layers.0.mixer.in_proj.z"),
        ("layers.0.mixer.in_proj.bias", "z", "layers.0.mixer.in_proj.z.bias"),
        ("layers.0.mixer.out_proj.weight", "", "layers.0.mixer.out_proj.weight"),
        ("layers.0.mixer.A_log", "", "layers.0.mixer.A_log"),
    ],
)
def test_logical_names(parameter_name, piece_name, expected):
    assert logical_name(parameter_name, piece(piece_name, 1)) == expected


def test_logical_views_name_anything_laid_out_like_the_parameter():
    weight = parameter(piece("x", 2, 3), piece("B", 1, 3))
    momentum = torch.arange(9.0).view(3, 3)
    views = logical_views("conv.weight", weight, momentum)
    assert list(views) == ["conv.x", "conv.B"]
    assert views["conv.B"].tolist() == [[6.0, 7.0, 8.0]]


def test_matrices_decay_and_vectors_do_not():
    assert ParamLayout((piece("", 2, 3),)).decays
    assert ParamLayout((piece("", 2, 3, 4),)).decays
    assert not ParamLayout((piece("x", 2), piece("B", 3))).decays


def drawn(name: str, *shape: int, **options) -> Piece:
    return Piece(name, shape, lambda generator, shape: torch.randn(shape, generator=generator), **options)


def boxes_of_all_ranks(pieces, shard: Shard, ranks: int, cut_rows: int) -> list[tuple[int, Box]]:
    """(number of the piece, box) of every rank of `ranks` tensor x `cut_rows` data ranks, copies once."""
    found = []
    for rank in range(ranks):
        layout = ParamLayout(pieces, shard, rank, ranks)
        rows = layout.tensor_shape[0]
        chunk = -(-rows // cut_rows)
        for part in range(cut_rows):
            first, end = min(rows, part * chunk), min(rows, (part + 1) * chunk)
            held = replace(layout, rows=(first, end)).boxes
            assert all(box.local[0] + box.shape[0] <= end - first for box in held), "a box outside of its rank's rows"
            found += [(pieces.index(box.piece), box) for box in held if box.copy == 0]
    return found


@given(
    units=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    width=st.integers(1, 4),
    ranks=st.sampled_from([1, 2, 4]),
    cut_rows=st.integers(1, 5),
    axis=st.sampled_from([0, 1]),
    blocks=st.sampled_from([1, 2]),
    parts=st.sampled_from([None, 1, 2]),
)
def test_the_boxes_of_all_ranks_are_every_element_once(units, width, ranks, cut_rows, axis, blocks, parts):
    """Whatever is stacked, cut along either axis, and cut again by rows, so that a piece may end in the middle of a rank."""
    sizes = [n * 4 * blocks for n in units]
    shapes = [(n, width) if axis == 0 else (width, sizes[0]) for n in sizes]
    pieces = tuple(drawn(str(i), *shape, parts=parts) for i, shape in enumerate(shapes))
    shard = Shard(axis=axis, blocks=blocks)
    seen = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
    for number, box in boxes_of_all_ranks(pieces, shard, ranks, cut_rows):
        box.of_whole(seen[number]).add_(1)
    assert all(torch.equal(count, torch.ones_like(count)) for count in seen)


@given(rows=st.integers(1, 40), ranks=st.sampled_from([1, 2, 3, 8]))
def test_a_vocabulary_is_cut_as_equally_as_it_divides(rows, ranks):
    held = [ParamLayout((drawn("", rows, 2),), Shard(axis=0, even=False), rank, ranks) for rank in range(ranks)]
    sizes = [layout.tensor_shape[0] for layout in held]
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1


def test_what_does_not_divide_is_refused_with_its_name():
    with pytest.raises(ConfigError, match=r"k \[6, 3\] cannot be shared by 4 ranks"):
        _ = ParamLayout((drawn("k", 6, 3),), Shard(axis=0), 0, 4).boxes


def test_ranks_that_hold_the_same_part_are_numbered():
    held = [ParamLayout((drawn("k", 6, 3, parts=2),), Shard(axis=0), rank, 4).boxes[0] for rank in range(4)]
    assert [(box.offsets[0], box.copies, box.copy) for box in held] == [(0, 2, 0), (0, 2, 1), (3, 2, 0), (3, 2, 1)]


def test_first_values_do_not_depend_on_who_draws_them(monkeypatch):
    """Blocks of a few rows, cuts that fall inside of them, and rows that are padding."""
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", 12)
    piece = drawn("", 23, 4, filled=21)
    whole = torch.empty(23, 4)
    init.draw(ParamLayout((piece,)).boxes[0], whole, 7, "w")
    assert not whole[21:].any()
    assert len(set(whole[:21].flatten().tolist())) == 84, "two blocks drew the same numbers"
    for axis in (0, 1):
        for rank in range(4):
            layout = ParamLayout((piece,), Shard(axis=axis, even=False), rank, 4)
            for first in range(0, layout.tensor_shape[0], 2):
                for box in replace(layout, rows=(first, first + 2)).boxes:
                    part = torch.full(box.shape, torch.nan)
                    init.draw(box, part, 7, "w")
                    assert torch.equal(part, box.of_whole(whole)), f"axis {axis}, rank {rank}, from row {first}"
