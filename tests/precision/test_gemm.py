"""The slot by which a recipe takes over the products of a model."""

import torch

from nemohybrid.model.linear import Linear
from nemohybrid.precision import gemm
from nemohybrid.precision.gemm import bind


def test_every_product_of_a_model_goes_through_its_slot(tiny_model, token_rows, monkeypatch):
    model, multiplied = tiny_model("M-*E"), []

    def counting(x, weight, bias):
        multiplied.append(id(weight))
        return gemm.plain_gemm(x, weight, bias)

    monkeypatch.setitem(gemm.RECIPES, "counting", counting)
    before = model(token_rows(2, 9))
    bind(model.modules(), "counting")
    assert torch.equal(model(token_rows(2, 9)), before)
    slots = {id(m.weight) for m in model.modules() if isinstance(m, Linear)} | {id(model.output.weight)}
    assert set(multiplied) == slots


def test_a_product_keeps_the_dtype_of_its_input():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    out = gemm.plain_gemm(torch.randn(2, 4, dtype=torch.bfloat16), weight, bias)
    assert out.dtype == torch.bfloat16
    assert gemm.plain_gemm(torch.randn(2, 4), weight, None).dtype == torch.float32
