"""The loss of a model is the same whether its logits are kept, or made a chunk of tokens at a time and once more."""

import pytest
import torch

from nemohybrid.model.sequence import SequenceContext
from nemohybrid.precision.gemm import plain_gemm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels are interpreted


def loss_and_gradients(model, ids):
    """Of all the model's heads, some of whose tokens weigh nothing; tied, its one matrix is used in three ways."""
    seq = SequenceContext(*ids.shape)
    hidden = model.hidden_states(ids, seq)
    drafts = model.mtp_hidden_states(hidden, ids, seq)
    losses = [model.output.cross_entropy(x, ids.roll(-1, 1).flatten(), seq) for x in (hidden, *drafts)]
    weights = torch.arange(ids.numel(), device=ids.device) % 3 / ids.numel()
    total = sum(scale * (loss * weights).sum() for scale, loss in zip((1.0, 0.05), losses, strict=True))
    model.zero_grad(set_to_none=True)
    total.backward()
    return {"loss": total.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["own matrix", "tied"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_backend_gives_the_loss_and_gradients_of_plain(
    backend, tied, tiny_model, token_rows, assert_close_to_scale
):
    if backend == "triton":
        pytest.importorskip("triton")
    model = tiny_model("M-/-", tie_embeddings=tied, vocab_multiple=8).to(DEVICE)
    ids = token_rows(2, 11).to(DEVICE)
    assert model.output.weight.shape[0] > model.output.columns, "rows of padding"
    model.output.backend = "plain"
    want = loss_and_gradients(model, ids)
    model.output.backend = backend
    assert_close_to_scale(loss_and_gradients(model, ids), want, 1e-5)


def test_a_product_of_another_precision_keeps_its_logits(tiny_model, token_rows):
    model, ids, asked = tiny_model("-"), token_rows(1, 5), []

    def another(x, weight, bias):
        asked.append(len(x))
        return plain_gemm(x, weight, bias)

    model.output.gemm, model.output.backend = another, "torch"
    model.output.cross_entropy(torch.ones(5, 24), ids.flatten(), SequenceContext(1, 5))
    assert asked == [5], "the loss was computed without the product that the recipe chose"
