"""Packed documents and causality: no layer lets a token know what it must not know."""

import pytest
import torch

from nemohybrid.config.model import AttentionConfig
from nemohybrid.model import SequenceContext

ROPE = {"attention": AttentionConfig(position_embedding="rope")}
KINDS = {
    "M": ("M", {}),
    "M wide convolution": ("M", {"conv_kernel": 7, "conv_bias": False}),
    "*": ("*", {}),
    "* rope": ("**", ROPE),
    "-": ("-", {}),
    "E": ("E", {}),
    "hybrid": ("M*-ME", ROPE),
}
SPLIT = [[5, 1, 13, 2], [11, 10]]  # documents shorter than the convolution, and longer than a chunk of 8


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request, tiny_model):
    pattern, changes = request.param
    return tiny_model(pattern, **changes)


def run_separately(model, ids):
    """[2, 21, V]: each document of SPLIT as a row of its own."""
    rows = [torch.cat([model(doc[None])[0] for doc in row.split(n)]) for row, n in zip(ids, SPLIT, strict=True)]
    return torch.stack(rows)


def test_packed_documents_equal_rows_run_separately(model, token_rows, gradients, assert_close_to_scale):
    ids = token_rows(2, 21)
    packed, separate = model(ids, SequenceContext.packed(SPLIT)), run_separately(model, ids)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5 * separate.abs().max().item())
    assert_close_to_scale(gradients(model, packed), gradients(model, separate), 2e-5)


def test_document_ids_need_not_be_sorted_or_unique(model, token_rows):
    ids = token_rows(1, 12)
    names = torch.tensor([[7, 7, 7, 2, 2, 2, 2, 7, 7, 0, 0, 0]])  # 7 comes back as another document
    got = model(ids, SequenceContext(1, 12, names))
    want = model(ids, SequenceContext.packed([[3, 4, 2, 3]]))
    assert torch.equal(got, want), "only the places where the id changes may matter"


def test_a_token_changes_no_logits_before_it_and_none_of_another_document(model, token_rows):
    ids = token_rows(2, 21)
    for at in (0, 4, 5, 6, 18, 20):
        changed = ids.clone()
        changed[0, at] = (changed[0, at] + 1) % 61
        end = next(end for end in (5, 6, 19, 21) if at < end)  # of the document, in the first row of SPLIT
        seq = SequenceContext.packed(SPLIT)
        moved = (model(ids, seq) - model(changed, SequenceContext.packed(SPLIT))).abs().amax(-1)
        allowed = torch.zeros(2, 21, dtype=torch.bool)
        allowed[0, at:end] = True
        assert moved[~allowed].max() < 1e-5, f"token {at} moves logits at {(moved * ~allowed).nonzero().tolist()}"
        assert moved[0, at] > 1e-3, f"token {at} does not even move its own logits"


def test_the_past_within_a_document_is_used(tiny_model, token_rows):
    ids = token_rows(1, 12)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 61
    for pattern in ("M", "*"):
        moved = (tiny_model(pattern)(ids) - tiny_model(pattern)(changed)).abs().amax(-1)
        assert moved[0, 3:].min() > 1e-5, f"{pattern} forgets a token right after it"


def test_no_context_means_one_document_a_row(model, token_rows):
    ids = token_rows(2, 9)
    torch.testing.assert_close(model(ids), model(ids, SequenceContext.packed([[9], [9]])), rtol=1e-5, atol=1e-5)
