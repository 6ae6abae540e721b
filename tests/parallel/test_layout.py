"""What a parameter is made of."""

import pytest
import torch

from nemohybrid.parallel.layout import ParamLayout, Piece, layout_of, logical_name, logical_views, parameter


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
