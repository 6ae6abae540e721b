"""The MTP part of a model: what is stored, what each depth may know, and what comes out. Its numbers: tests/train/test_mtp.py."""

import pytest
import torch

from nemohybrid.config.model import MTPConfig
from nemohybrid.model import SequenceContext

PATTERNS = ["M*/*E/*E", "E-/M-/M-/M-"]
SEPARATE = MTPConfig(repeat_block=False)


@pytest.mark.parametrize("repeat, stored", [(True, 1), (False, 3)])
def test_one_block_is_stored_or_one_for_each_depth(tiny_model, repeat, stored):
    model = tiny_model("M/*-/*-/*-", mtp=MTPConfig(repeat_block=repeat))
    assert (len(model.mtp), model.mtp_depth) == (stored, 3)
    block = {name.removeprefix("mtp.0.") for name, _ in model.named_parameters() if name.startswith("mtp.0.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "final_norm.weight", "layers.1.norm.weight"} <= block
    if stored > 1:
        assert not torch.equal(model.mtp[0].eh_proj.weight, model.mtp[1].eh_proj.weight), "blocks start alike"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_a_depth_answers_where_the_row_has_a_token_to_read(tiny_model, token_rows, length):
    """[B, L - 1 - k, V], empty where the row is too short."""
    logits = tiny_model("M/*-/*-/*-").forward_mtp(token_rows(2, length))
    assert [tuple(one.shape) for one in logits] == [(2, max(0, length - 1 - k), 61) for k in range(3)]
    assert tiny_model("M").forward_mtp(token_rows(2, length)) == []


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_depth_sees_the_tokens_up_to_its_own_and_no_further(tiny_model, token_rows, pattern):
    model, ids = tiny_model(pattern), token_rows(1, 12)
    before = model.forward_mtp(ids)
    for at in (0, 5, 11):
        changed = ids.clone()
        changed[0, at] = (changed[0, at] + 1) % 61
        for k, (old, new) in enumerate(zip(before, model.forward_mtp(changed), strict=True)):
            moved = (old - new).abs().amax(-1)[0]
            first = max(0, at - k - 1)  # of the positions that have read token `at`
            assert (moved[:first] < 1e-5).all(), f"depth {k} knows token {at}: {moved[:first].tolist()}"
            assert moved[first] > 1e-4, f"depth {k} does not read token {at}"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_are_drafted_as_rows_of_their_own(tiny_model, token_rows, pattern):
    """Up to where a document lacks the next tokens: what follows there is masked in training."""
    model, ids, lengths = tiny_model(pattern), token_rows(1, 21), [5, 1, 13, 2]
    packed = model.forward_mtp(ids, SequenceContext.packed([lengths]))
    start = 0
    for document in ids[0].split(lengths):
        for k, want in enumerate(model.forward_mtp(document[None])):
            got = packed[k][:, start : start + want.shape[1]]
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5, msg=lambda m, k=k: f"depth {k}: {m}")
        start += len(document)


def test_separate_blocks_that_are_equal_are_the_repeated_one(tiny_model, token_rows):
    one, several = tiny_model("M/*-/*-"), tiny_model("M/*-/*-", mtp=SEPARATE)
    values = one.state_dict()
    several.load_state_dict(values | {n.replace("mtp.0.", "mtp.1."): v for n, v in values.items() if "mtp" in n})
    for got, want in zip(several.forward_mtp(token_rows(2, 9)), one.forward_mtp(token_rows(2, 9)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit_of_a_draft(tiny_model, token_rows, gradients, dtype):
    model, ids = tiny_model("M*/*E/*E", dtype=dtype), token_rows(2, 12)
    plain = [model(ids), *model.forward_mtp(ids)]
    kept = gradients(model, *plain)
    model.recompute = True
    again = [model(ids), *model.forward_mtp(ids)]
    recomputed = gradients(model, *again)
    assert all(torch.equal(old, new) for old, new in zip(plain, again, strict=True))
    assert [name for name, gradient in kept.items() if not torch.equal(gradient, recomputed[name])] == []
