"""The choice of experts against a formula (see test_router.py for its losses); the experts against one token at a time."""

import pytest
import torch
import torch.nn.functional as F

from nemohybrid.config.model import RouterConfig
from nemohybrid.model import SequenceContext


def moe_of(tiny_model, **changes):
    mixer = tiny_model("E", **changes).layers[0].mixer
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(1))
    return mixer, x, SequenceContext(2, 10)


def act(kind: str, h):
    return F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] if kind == "swiglu" else h.clamp(min=0) ** 2


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
@pytest.mark.parametrize("shared", [0, 18])
def test_a_token_gets_the_weighted_sum_of_its_experts_and_the_shared_one(activation, shared, tiny_model):
    mixer, x, seq = moe_of(tiny_model, activation=activation, shared_expert_ffn_hidden_size=shared)
    got, (ids, weights) = mixer(x, seq), mixer.router(x)
    for t in range(20):
        want = sum(
            w * mixer.experts.down[e] @ act(activation, mixer.experts.up[e] @ x[t])
            for e, w in zip(ids[t], weights[t], strict=True)
        )
        if shared:
            want = want + mixer.shared_expert.fc2(act(activation, mixer.shared_expert.fc1(x[t])))
        torch.testing.assert_close(got[t], want, rtol=1e-5, atol=1e-5, msg=f"token {t}")


def test_a_token_visits_k_different_experts_and_none_is_dropped(tiny_model):
    mixer, x, _ = moe_of(tiny_model, moe_top_k=3)
    mixer.router.expert_bias[2] = 5.0  # everybody wants expert 2: a capacity limit would drop tokens
    ids, weights = mixer.router(x)
    assert ids.shape == weights.shape == (20, 3)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all(), "an expert is visited twice"
    assert (ids == 2).any(-1).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(20), rtol=1e-5, atol=0)


def test_the_bias_moves_the_choice_and_not_the_weights(tiny_model):
    mixer, x, _ = moe_of(tiny_model, router=RouterConfig(normalize=False))
    mixer.router.expert_bias[4] = 5.0
    ids, weights = mixer.router(x)
    torch.testing.assert_close(weights, (x @ mixer.router.gate.weight.T).sigmoid().gather(1, ids))
    assert not mixer.router.expert_bias.requires_grad


def test_only_the_best_groups_are_chosen_from(tiny_model):
    mixer, x, _ = moe_of(tiny_model, router=RouterConfig(groups=3, top_groups=1))
    ids, _ = mixer.router(x)
    assert (ids // 2 == ids[:, :1] // 2).all(), "experts of two groups, where one may be chosen from"


def test_experts_without_tokens_get_zero_gradients_and_not_none(tiny_model):
    mixer, x, seq = moe_of(tiny_model)
    mixer.router.expert_bias[:] = torch.tensor([0.0, 0.0, 0.0, -9.0, -9.0, 0.0])
    mixer(x, seq).square().sum().backward()
    for name, gradient in (("up", mixer.experts.up.grad), ("down", mixer.experts.down.grad)):
        used = gradient.flatten(1).any(1)
        assert used.tolist() == [True, True, True, False, False, True], f"{name}: {used.tolist()}"


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_gate_gradient_is_the_slope_of_the_formula_in_float64(score, normalize, tiny_model):
    """Central differences of sum(weights * coefficients) with the chosen experts held fixed, steps of 1e-5."""
    mixer, x, _ = moe_of(tiny_model, router=RouterConfig(score=score, normalize=normalize, scaling_factor=1.7))
    ids, weights = mixer.router(x)
    coefficients = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    (weights * coefficients).sum().backward()

    def formula(gate):
        logits = x.double() @ gate.T
        scores = (logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)).gather(1, ids)
        return ((scores / scores.sum(-1, keepdim=True) if normalize else scores) * 1.7 * coefficients).sum()

    gate = mixer.router.gate.weight.detach().double()
    slope = torch.zeros_like(gate)
    for i in range(gate.numel()):
        step = torch.zeros(gate.numel(), dtype=torch.float64).index_fill(0, torch.tensor(i), 1e-5).view_as(gate)
        slope.view(-1)[i] = (formula(gate + step) - formula(gate - step)) / 2e-5
    torch.testing.assert_close(mixer.router.gate.weight.grad.double(), slope, rtol=1e-4, atol=1e-5)


def test_the_router_decides_in_fp32_under_bf16(tiny_model):
    mixer, x, _ = moe_of(tiny_model, dtype="bfloat16")
    rounded = x.bfloat16()
    for got, want in zip(mixer.router(rounded), mixer.router(rounded.float()), strict=True):
        assert torch.equal(got, want)
    assert mixer.router(rounded)[1].dtype == torch.float32
