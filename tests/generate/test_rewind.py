"""Tokens that were fed by mistake are taken back, and nothing remembers them."""

import weakref

import pytest
import torch

from nemohybrid.config.model import AttentionConfig
from nemohybrid.errors import ConfigError
from nemohybrid.generate.engine import Decoder
from nemohybrid.model.mlp import MLP

KINDS = {
    "M": ("MM", {"mamba_bc_norm": True}),
    "M wide convolution": ("M", {"conv_kernel": 7}),
    "*": ("**", {"attention": AttentionConfig(qk_norm=True)}),
    "* rope": ("**", {"attention": AttentionConfig(position_embedding="rope")}),
    "hybrid": ("M*-E", {}),
}
PAST, WRONG = 6, 5  # tokens that stay, tokens of which some are taken back


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request, tiny_model):
    pattern, changes = request.param
    return tiny_model(pattern, **changes).requires_grad_(False)


def assert_never_seen(decoder, other, tokens, what):
    """Both go on alike with `tokens`, all but one in one piece."""
    for piece in tokens.split([tokens.shape[1] - 1, 1], dim=1):
        off = (decoder.hidden_states(piece) - other.hidden_states(piece)).abs().max()
        assert off < 1e-5, f"{what}: off by {off:.1e}"
    assert decoder.cache.length == other.cache.length


@pytest.mark.parametrize("taken", range(WRONG + 1))
def test_what_is_taken_back_was_never_seen(taken, model, token_rows):
    ids, kept = token_rows(2, 30), PAST + WRONG - taken
    decoder, other = Decoder(model), Decoder(model)
    decoder.feed(ids[:, :PAST])
    decoder.cache.rewindable = True
    decoder.feed(ids[:, PAST : PAST + WRONG])
    decoder.cache.rewind(taken)
    other.feed(ids[:, :PAST])
    if kept > PAST:
        other.feed(ids[:, PAST:kept])
    assert_never_seen(decoder, other, ids[:, 22:], f"{taken} of {WRONG} taken back")


def test_taking_back_in_portions_and_again_and_again_leaves_nothing(model, token_rows):
    ids = token_rows(1, 40)
    decoder, other = Decoder(model), Decoder(model)
    decoder.cache.rewindable = True
    for round_ in range(4):
        good, bad = ids[:, 2 * round_ : 2 * round_ + 2], ids[:, 20 + round_ : 24 + round_]
        decoder.feed(torch.cat([good, bad], dim=1))
        decoder.cache.rewind(1)
        decoder.cache.rewind(3)
        other.feed(good)
    assert_never_seen(decoder, other, ids[:, 30:], "four rounds")


def test_a_cache_that_is_rewound_to_the_start_is_new(model, token_rows):
    ids = token_rows(2, 12)
    decoder, other = Decoder(model), Decoder(model)
    decoder.cache.rewindable = True
    decoder.feed(ids[:, 6:9], torch.tensor([[3, 3, 4], [3, 3, 3]]))
    decoder.cache.rewind(3)
    assert decoder.cache.document_ids is None
    assert_never_seen(decoder, other, ids, "from the start")


@pytest.mark.parametrize("taken", range(5))
def test_a_document_that_began_in_what_is_taken_back_did_not_begin(taken, model, token_rows):
    """Row 0 begins one with the call, row 1 two tokens later, row 2 none: what stays of them stays begun."""
    ids, kept = token_rows(3, 20), 9 - taken
    documents = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 5 + [2] * 2, [7] * 9])
    decoder, other = Decoder(model), Decoder(model)
    decoder.feed(ids[:, :5], documents[:, :5])
    decoder.cache.rewindable = True
    decoder.feed(ids[:, 5:9], documents[:, 5:])
    decoder.cache.rewind(taken)
    other.feed(ids[:, :kept], documents[:, :kept])
    assert_never_seen(decoder, other, ids[:, 12:], f"{taken} taken back")


def test_left_padded_prompts_stay_padded(model, token_rows):
    prompts, ids = [[5], [7, 8, 9, 10, 11], [20, 21, 22]], token_rows(3, 14)
    decoder, other = Decoder(model), Decoder(model)
    for each in (decoder, other):
        each.prefill(prompts)
    decoder.cache.rewindable = True
    decoder.feed(ids[:, 8:])
    decoder.cache.rewind(6)
    assert_never_seen(decoder, other, ids[:, :8], "after the prompts")


def test_only_the_last_call_is_kept_to_be_taken_back(tiny_model, token_rows):
    """Each state could hold the one before it, and all of them the whole text."""
    decoder, ids = Decoder(tiny_model("M").requires_grad_(False)), token_rows(1, 9)
    decoder.cache.rewindable = True
    states = []
    for start in range(0, 9, 3):
        decoder.feed(ids[:, start : start + 3])
        (state,) = decoder.cache.states.values()
        states.append((weakref.ref(state), weakref.ref(state.ssm)))
        del state
    assert states[0][0]() is None
    assert states[0][1]() is None, "two calls ago"


def test_a_prompt_is_not_kept_to_be_taken_back(tiny_model, token_rows):
    decoder = Decoder(tiny_model("M").requires_grad_(False))
    decoder.feed(token_rows(1, 9))
    (state,) = decoder.cache.states.values()
    assert state.after is None
    with pytest.raises(AssertionError, match="not rewindable"):
        decoder.cache.rewind(1)


def test_taking_back_more_than_the_last_call_is_our_mistake(tiny_model, token_rows):
    decoder = Decoder(tiny_model("M").requires_grad_(False))
    decoder.cache.rewindable = True
    for _ in range(2):
        decoder.feed(token_rows(1, 3))
    with pytest.raises(AssertionError, match="4 tokens are to be taken back, but the last call fed 3"):
        decoder.cache.rewind(4)


def test_a_mixer_that_cannot_take_tokens_back_is_named(tiny_model, token_rows, monkeypatch):
    def forward(self, x, seq):
        seq.cache.states[self] = x[-1:]
        return x

    monkeypatch.setattr(MLP, "forward", forward)
    decoder = Decoder(tiny_model("M-").requires_grad_(False))
    decoder.cache.rewindable = True
    decoder.feed(token_rows(1, 4))
    with pytest.raises(
        ConfigError, match=r"taken back from MLP: .* a Tensor, has no `rewind`. Legal: generate without"
    ):
        decoder.cache.rewind(1)
