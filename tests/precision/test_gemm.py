"""The slot by which a recipe takes over the products of a model."""

import pytest
import torch
import torch.nn.functional as F

from nemohybrid.model.linear import Linear
from nemohybrid.precision import gemm


def test_every_product_of_a_model_goes_through_its_slot(tiny_model, token_rows):
    model, multiplied = tiny_model("M-*E"), []

    def counting(x, weight, bias):
        multiplied.append(id(weight))
        return gemm.plain_gemm(x, weight, bias)

    before = model(token_rows(2, 9))
    slots = [module for module in model.modules() if isinstance(module, Linear)] + [model.output]
    for module in slots:
        module.gemm = counting
    assert torch.equal(model(token_rows(2, 9)), before)
    assert set(multiplied) == {id(module.weight) for module in slots}


def test_a_product_keeps_the_dtype_of_its_input():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    out = gemm.plain_gemm(torch.randn(2, 4, dtype=torch.bfloat16), weight, bias)
    assert out.dtype == torch.bfloat16
    assert gemm.plain_gemm(torch.randn(2, 4), weight, None).dtype == torch.float32


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (4,)])
def test_a_cast_product_keeps_no_cast_and_has_the_gradients_of_a_plain_one(shape):
    """Bit by bit those of `F.linear` on the cast; what is kept is what was given."""
    x = torch.randn(shape, dtype=torch.bfloat16)
    weight, bias = torch.randn(5, 4), torch.randn(5)

    def run(multiply) -> tuple[list[torch.Tensor], set[int]]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        kept = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = multiply(*leaves)
        y.backward(torch.arange(y.numel(), dtype=y.dtype).view_as(y))
        return [y.detach(), *(leaf.grad for leaf in leaves)], kept - {t.data_ptr() for t in leaves}

    got, beside = run(gemm.plain_gemm)
    wanted, _ = run(lambda a, w, b: F.linear(a, w.bfloat16(), b.bfloat16()))
    assert not beside, "something else was kept than what was given"
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_bias_may_be_of_another_type_than_its_weight():
    x, weight, bias = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((3, 4), (5, 4), (5,)))
    assert torch.equal(gemm.plain_gemm(x, weight, bias.float()), F.linear(x, weight, bias))
