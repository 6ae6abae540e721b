"""Sampling rules, by exact probabilities."""

import math

import pytest
import torch

from nemohybrid.errors import ConfigError
from nemohybrid.generate.sampling import Sampling

LOGITS = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.05, 0.05, 0.1, 0.8]]).log()


def probabilities(logits=LOGITS, temperature=1.0, **options):
    return Sampling(temperature, **options).probabilities(logits)


def expect(got, *rows):
    torch.testing.assert_close(got, torch.tensor(rows), rtol=1e-5, atol=1e-7)


def test_temperature_one_leaves_the_distribution_alone():
    torch.testing.assert_close(probabilities(), LOGITS.exp())


def test_temperature_raises_probabilities_to_its_inverse():
    squared = LOGITS.exp().square()
    torch.testing.assert_close(probabilities(temperature=0.5), squared / squared.sum(-1, keepdim=True))


def test_a_tiny_temperature_is_greedy_and_not_nan():
    expect(probabilities(temperature=1e-40), [1.0, 0, 0, 0], [0, 0, 0, 1.0])


def test_top_k_keeps_the_k_most_likely():
    expect(probabilities(top_k=2), [4 / 7, 0, 3 / 7, 0], [0, 0, 1 / 9, 8 / 9])
    expect(probabilities(top_k=1), [1.0, 0, 0, 0], [0, 0, 0, 1.0])
    torch.testing.assert_close(probabilities(top_k=9), LOGITS.exp())


def test_top_k_is_exactly_k_when_logits_tie():
    """bf16 logits tie often; the lowest ids win, as in greedy choice."""
    expect(probabilities(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), top_k=2), [0, 0.5, 0.5, 0])
    assert probabilities(torch.zeros(1, 4096), top_k=3).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def test_top_p_keeps_the_fewest_that_hold_p():
    expect(probabilities(top_p=0.65), [4 / 7, 0, 3 / 7, 0], [0, 0, 0, 1.0])
    expect(probabilities(top_p=0.75), [4 / 9, 0, 3 / 9, 2 / 9], [0, 0, 0, 1.0])
    expect(probabilities(torch.zeros(1, 4), top_p=0.5), [0.5, 0.5, 0, 0])


def test_a_tiny_top_p_keeps_the_most_likely():
    expect(probabilities(top_p=1e-12), [1.0, 0, 0, 0], [0, 0, 0, 1.0])


def test_top_p_applies_to_what_top_k_left():
    """The best two of four hold 0.7; of the best three, renormalised, 7/9, which is enough for 0.75."""
    expect(probabilities(top_k=3, top_p=0.75), [4 / 7, 0, 3 / 7, 0], [0, 0, 0, 1.0])


def test_temperature_applies_before_top_p():
    """Squared and normalised: 16/30, 1/30, 9/30, 4/30, so that the first alone holds half."""
    expect(probabilities(LOGITS[:1], temperature=0.5, top_p=0.5), [1.0, 0, 0, 0])


def test_impossible_tokens_stay_impossible():
    got = probabilities(torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]), top_k=3, top_p=0.99)
    expect(got, [0.5, 0, 0.5, 0])


def test_bf16_logits_are_sampled_in_fp32():
    assert probabilities(LOGITS.bfloat16()).dtype == torch.float32


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert Sampling(temperature=0).choose(logits, torch.Generator()).tolist() == [1, 0]


def test_tokens_are_drawn_with_these_probabilities():
    """20,000 draws: the frequency of probability p is within 5 standard deviations, sqrt(p (1 - p) / 20000)."""
    sampling, generator = Sampling(temperature=1.0, top_k=3), torch.Generator().manual_seed(0)
    drawn = sampling.choose(LOGITS[:1].expand(20_000, 4), generator).bincount(minlength=4) / 20_000
    for token, p in enumerate([4 / 9, 0.0, 3 / 9, 2 / 9]):
        assert abs(drawn[token].item() - p) <= 5 * math.sqrt(p * (1 - p) / 20_000), f"token {token}: {drawn[token]:.4f}"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options)).replace("_", "-")):
        Sampling(**options)
