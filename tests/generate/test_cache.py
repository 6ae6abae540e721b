"""Decoding token by token, from recurrent state and KV cache, is the full forward pass."""

import pytest
import torch

from nemohybrid.config.model import AttentionConfig
from nemohybrid.generate.engine import Decoder, generate_tokens
from nemohybrid.generate.sampling import Sampling
from nemohybrid.model import DecodeCache, SequenceContext
from nemohybrid.model.mamba2 import MambaState

ROPE = {"attention": AttentionConfig(position_embedding="rope")}
KINDS = {
    "M": ("MM", {}),
    "M wide convolution": ("M", {"conv_kernel": 7}),
    "*": ("**", {}),
    "* rope": ("**", ROPE),
    "-": ("-", {}),
    "E": ("E", {}),
    "hybrid": ("M*-ME*", ROPE),
}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22]]  # 1 is less than the convolution looks back
GREEDY = Sampling(temperature=0)


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request, tiny_model):
    pattern, changes = request.param
    return tiny_model(pattern, **changes).requires_grad_(False)


def assert_same_logits(got, want, what):
    assert (got - want).abs().max() < 1e-4, f"{what}: off by {(got - want).abs().max():.1e}"


@pytest.mark.parametrize("first", [[1], [5], [19], [3, 4, 1, 2, 9]], ids=str)
def test_every_step_gives_the_logits_of_the_full_forward(first, model, token_rows):
    """`first`: the lengths of the first pieces; what follows is fed one token at a time."""
    ids = token_rows(2, 20)
    full, decoder, done = model(ids), Decoder(model), 0
    for length in first + [1] * (20 - sum(first)):
        logits = decoder.feed(ids[:, done : done + length])
        done += length
        assert_same_logits(logits, full[:, done - 1], f"after {done} tokens")


def test_greedy_tokens_are_those_of_the_full_forward(model):
    row = list(PROMPTS[1])
    for _ in range(12):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    assert generate_tokens(model, [PROMPTS[1]], 12, GREEDY) == [row[len(PROMPTS[1]) :]]


def test_a_batch_of_different_lengths_gives_each_prompt_what_it_gets_alone(model):
    together, alone = Decoder(model), [Decoder(model) for _ in PROMPTS]
    logits = together.prefill(PROMPTS)
    single = [decoder.prefill([prompt]) for decoder, prompt in zip(alone, PROMPTS, strict=True)]
    for step in range(6):
        assert_same_logits(logits, torch.cat(single), f"step {step}")
        tokens = logits.argmax(-1)
        logits = together.feed(tokens[:, None])
        single = [decoder.feed(token.view(1, 1)) for decoder, token in zip(alone, tokens, strict=True)]


def test_a_document_that_begins_in_a_later_call_starts_anew(model, token_rows):
    ids = token_rows(2, 14)
    documents = torch.tensor([[0] * 6 + [1] * 8, [0] * 9 + [1] * 5])  # row 0 changes exactly between the calls
    full = model(ids, SequenceContext(2, 14, documents))
    decoder = Decoder(model)
    decoder.feed(ids[:, :6], documents[:, :6])
    assert_same_logits(decoder.feed(ids[:, 6:13], documents[:, 6:13]), full[:, 12], "second call")
    assert_same_logits(decoder.feed(ids[:, 13:]), full[:, 13], "third call, which goes on with the last document")


def state_bytes(cache: DecodeCache) -> int:
    """Memory that the Mamba states hold on to, whatever they are views of."""
    states = [state for state in cache.states.values() if isinstance(state, MambaState)]
    assert states
    return sum(t.untyped_storage().nbytes() for state in states for t in (state.conv, state.ssm))


def test_mamba_remembers_in_constant_memory(tiny_model, token_rows):
    model, ids = tiny_model("M-M").requires_grad_(False), token_rows(2, 60)
    decoder, sizes = Decoder(model), []
    for start, length in ((0, 1), (1, 1), (2, 50), (52, 1), (53, 7)):
        decoder.feed(ids[:, start : start + length])
        sizes.append(state_bytes(decoder.cache))
    channels, per_head = 4 * 6 + 2 * 2 * 5, 4 * 6 * 5
    assert sizes == [2 * 2 * 4 * (3 * channels + per_head)] * 5, "layers x rows x bytes x (convolution + state)"


def test_mamba_state_is_fp32_under_bf16(tiny_model, token_rows):
    decoder = Decoder(tiny_model("M", dtype="bfloat16"))
    decoder.feed(token_rows(1, 9))
    (state,) = decoder.cache.states.values()
    assert state.ssm.dtype == torch.float32


def test_attention_room_is_at_most_twice_what_it_holds(tiny_model, token_rows):
    decoder, ids = Decoder(tiny_model("*")), token_rows(2, 40)
    for start in range(40):
        decoder.feed(ids[:, start : start + 1])
        (cache,) = decoder.cache.states.values()
        assert cache.length == start + 1
        assert cache.store.shape[3] <= 2 * cache.length


def test_decoding_leaves_no_graph_behind(tiny_model, token_rows):
    decoder = Decoder(tiny_model("M*"))
    assert not decoder.feed(token_rows(1, 5)).requires_grad
    assert not any(
        t.requires_grad for s in decoder.cache.states.values() for t in vars(s).values() if torch.is_tensor(t)
    )
