"""What context ranks send, by formula: numbers by hand, and the choice that `auto` makes by them."""

from dataclasses import replace
from functools import cache

import pytest

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.context import attention_heads, heads_divide, mamba_heads
from nemohybrid.plan.context_communication import WAYS, Share, middle

# Nemotron-H 8B: 128 Mamba heads of 64, 8 groups, state 128; 32 query heads, 8 key/value heads of 128; bf16
MODELS = ["nemotron_h_8b", "nemotron_nano_v2_12b", "nemotron3_nano_30b", "nemotron3_super", "tiny_moe"]
STATE = 128 * 64 * 128 * 4


@cache
def sizes(model):
    return load_model_config(["data=shakespeare", "data.tokenizer=byte", f"model={model}"])


def share(model="nemotron_h_8b", ranks=8, length=8192, part=None, tensor=1, documents=False):
    """`length` tokens on each of so many ranks."""
    config = sizes(model)
    data = replace(config.data, sequence_length=ranks * length, reset_documents=documents)
    config = replace(config, data=data, parallel=replace(config.parallel, context=ranks, tensor=tensor))
    return Share(config, 1, middle(ranks) if part is None else part)


def sent(symbol, way, of):
    """Bytes forward, and backward."""
    return [sum(send.sent(of.ranks) for send in passes) for passes in WAYS[symbol, way](of)]


def test_by_heads_a_token_costs_the_same_in_every_row():
    assert sent("M", "heads", share()) == [8192 * 2 * (16384 + 2048 + 128) * 7 / 8] * 2, "x and y, B and C, dt"
    assert sent("*", "heads", share()) == [8192 * 2 * 128 * (64 + 16) * 7 / 8] * 2, "q and what was attended, k and v"
    few = share("nemotron3_super")  # 2 key/value heads, of which each goes to four ranks
    assert sent("*", "heads", few) == sent("*", "heads", share())


def test_states_cost_the_same_for_every_row():
    taps, decays = 3 * (8192 + 2048) * 2, 128 * 4
    for length in (64, 65536):
        assert sent("M", "states", share(length=length)) == [
            4 * STATE + 3 * decays + taps,
            3 * STATE + 2 * decays + taps,
        ]
    assert sent("M", "states", share(part=0)) == [4 * STATE + 3 * decays + taps, 0]
    assert sent("M", "states", share(part=7)) == [0, 4 * STATE + 3 * decays + taps]


def test_the_ring_takes_keys_and_values_past_every_rank():
    q, kv = 8192 * 32 * 128 * 2, 8192 * 2 * 8 * 128 * 2
    forward = 2 * q + kv + 7 * kv
    assert sent("*", "ring", share()) == [forward, forward + 8 * 2 * kv], "gradients are fp32"
    ends = sent("*", "ring", share(part=0))
    assert ends == [forward - (2 * q + kv) / 2, forward + 8 * 2 * kv - (2 * q + kv) / 2], "half of its tokens stay"
    with_documents = sent("*", "ring", share(documents=True))
    assert with_documents == [forward + 8 * 8192 * 4, forward + 16 * kv + 7 * 8192 * 4]


@pytest.mark.parametrize("symbol, way", WAYS)
def test_no_rank_sends_more_than_the_one_in_the_middle(symbol, way):
    for ranks in (2, 4, 8, 16):
        totals = [sum(sent(symbol, way, share(ranks=ranks, part=part))) for part in range(ranks)]
        assert totals[middle(ranks)] == max(totals), ranks


@pytest.mark.parametrize("model", MODELS)
def test_auto_takes_the_way_that_sends_less(model):
    heads_of, chosen = {"*": attention_heads, "M": mamba_heads}, set()
    for tensor in (1, 2, 8) if model != "tiny_moe" else (1, 2):
        for ranks in (2, 4, 8, 16, 64):
            for length in (16, 64, 200, 256, 320, 400, 448, 512, 4096):
                of = share(model, ranks, length, tensor=tensor, documents=True)
                for symbol, other in (("*", "ring"), ("M", "states")):
                    divides = heads_divide(*heads_of[symbol](of.model, tensor), ranks)
                    less = sum(sent(symbol, other, of))
                    by_heads = divides and sum(sent(symbol, "heads", of)) < less
                    assert of.way(symbol) == ("heads" if by_heads else other), (symbol, tensor, ranks, length)
                    chosen.add((symbol, of.way(symbol)))
    assert chosen == set(WAYS), "every way is taken somewhere"
