"""LatentMoE against every expert on every token in float64, its slopes, its cost, and the sizes of equal cost."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nemohybrid.cli import params
from nemohybrid.config.accounting import moe_cost
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.latent import RoutedExperts, latent_of_equal_cost, routed_experts, standard_of_equal_cost
from nemohybrid.errors import ConfigError
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.init import initialize
from nemohybrid.parallel.layout import layout_of

SUPER = RoutedExperts(experts=128, top_k=6, hidden=4096, width=2688)
"""The standard mixture that Nemotron 3 Super stands for (arXiv 2601.18089)."""


def latent_moe(tiny_model, **changes):
    """A float64 layer that multiplies in float64, and tokens for it."""
    mixer = tiny_model("E", moe_latent_size=8, moe_top_k=3, **changes).layers[0].mixer.double()
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return mixer, x.requires_grad_(), SequenceContext(2, 10)


def act(kind: str, h):
    if kind == "swiglu":
        gate, up = h.chunk(2, -1)
        return gate * gate.sigmoid() * up
    return h.clamp(min=0) ** 2


def densely(mixer, x, kind: str):
    """All experts on all tokens between the two projections, those that were not chosen with weight 0."""
    scores = (x @ mixer.router.gate.weight.T).sigmoid()
    chosen = (scores + mixer.router.expert_bias).detach().topk(3).indices
    kept = scores * F.one_hot(chosen, 6).sum(1)
    weights_TE = kept / kept.sum(-1, keepdim=True)
    latent = x @ mixer.latent_down.weight.T
    inner = act(kind, torch.einsum("tl,efl->tef", latent, mixer.experts.up)) * weights_TE[..., None]
    routed = torch.einsum("tef,elf->tl", inner, mixer.experts.down) @ mixer.latent_up.weight.T
    shared = mixer.shared_expert
    return routed + act(kind, x @ shared.fc1.weight.T) @ shared.fc2.weight.T


@pytest.mark.parametrize("kind", ["squared_relu", "swiglu"])
def test_values_and_all_gradients_are_those_of_a_dense_computation(kind, tiny_model):
    mixer, x, seq = latent_moe(tiny_model, activation=kind)
    got, want = mixer(x, seq), densely(mixer, x, kind)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    names, tensors = zip(("x", x), *mixer.named_parameters(), strict=True)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(out, tensors, grad) for out in (got, want))
    assert len(names) == 8, f"of {names}"
    for name, mine, expected in zip(names, ours, theirs, strict=True):
        assert expected.abs().max() > 0, f"{name}: nothing to compare"
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("latent", [None, 4])
def test_the_whole_layer_passes_gradcheck(latent, tiny_model):
    """Finite differences of every input and parameter in float64. SwiGLU: relu has a kink that steps may cross."""
    sizes = {"hidden_size": 6, "moe_ffn_hidden_size": 3, "shared_expert_ffn_hidden_size": 3, "num_experts": 3}
    mixer = tiny_model("E", activation="swiglu", moe_latent_size=latent, init_std=0.5, **sizes).layers[0].mixer.double()
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in mixer.named_parameters()), strict=True)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, SequenceContext(1, 4)))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_experts_see_the_latent_and_router_and_shared_expert_the_full_width(tiny_model):
    mixer, _, _ = latent_moe(tiny_model)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "router.gate.weight": (6, 24),
        "experts.up": (6, 14, 8),
        "experts.down": (6, 8, 14),
        "latent_down.weight": (8, 24),
        "latent_up.weight": (24, 8),
        "shared_expert.fc1.weight": (18, 24),
        "shared_expert.fc2.weight": (24, 18),
    }


def test_the_projections_are_whole_on_every_tensor_rank(tiny_model):
    mixer, _, _ = latent_moe(tiny_model)
    for name in ("latent_down", "latent_up"):
        assert layout_of(getattr(mixer, name).weight).shard is None, f"{name} would be cut (Megatron-LM duplicates it)"


def test_first_values_are_those_of_an_entry_and_of_an_exit(tiny_config):
    """16 layers: what adds to the residual stream begins four times smaller."""
    config = tiny_config("E" * 16, hidden_size=64, moe_latent_size=48, init_std=0.02)
    model = HybridModel.create(config)
    initialize(model, 0)
    values = dict(model.named_parameters())
    assert values["layers.3.mixer.latent_down.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["layers.3.mixer.latent_up.weight"].std().item() == pytest.approx(0.005, rel=0.05)


def test_the_cost_of_a_layer_is_the_formula():
    """Forward FLOPs 2 [K 2 l m + 2 d l + 2 d s + E d] a token, for Super."""
    m = load_model_config(["model=nemotron3_super"]).model
    d, latent, width, shared, experts, k = 4096, 1024, 2688, 5376, 512, 22
    cost = moe_cost(m)
    assert cost.flops == 2 * (k * 2 * latent * width + 2 * d * latent + 2 * d * shared + experts * d)
    assert cost.parameters - cost.active == (experts - k) * 2 * latent * width
    assert cost.active == cost.flops / 2 + d, "every weight that is met is multiplied once, but the norm's"


def test_super_visits_22_experts_and_not_24():
    """129.5 M weights in place of 132.1 M; 24 visits would meet 140.5 M."""
    latent = latent_of_equal_cost(SUPER, 1024)
    assert (latent.experts, latent.top_k) == (512, 22)
    assert latent == routed_experts(load_model_config(["model=nemotron3_super"]).model)
    weights = [option.active_weights for option in (latent, SUPER, replace(latent, top_k=24))]
    assert [round(w / 1e6, 1) for w in weights] == [129.5, 132.1, 140.5]
    assert standard_of_equal_cost(latent) == SUPER


@pytest.mark.parametrize("matrices", [2, 3], ids=["squared_relu", "swiglu"])
@pytest.mark.parametrize("width", [96, 320, 1000])
@pytest.mark.parametrize("latent", [48, 64, 100, 128])
def test_one_visit_more_would_cost_more(latent, width, matrices):
    standard = RoutedExperts(experts=16, top_k=5, hidden=256, width=width, matrices=matrices)
    found = latent_of_equal_cost(standard, latent)
    assert found.active_weights <= standard.active_weights
    assert replace(found, top_k=found.top_k + 1).active_weights > standard.active_weights


def test_latent_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="latent size of 4096: legal are 1 to 4095"):
        latent_of_equal_cost(SUPER, 4096)
    with pytest.raises(ConfigError, match=r"projections cost as much as 64\.0 visits, 6 visits before are 24\.0 now"):
        latent_of_equal_cost(replace(SUPER, width=64), 1024)


def test_params_shows_what_an_equally_costly_latent_moe_would_be(capsys):
    assert params.main(["model=nemotron3_nano_30b"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "model.moe_latent_size=672" in line]
    assert lines == [["model.moe_latent_size=672", "22", "of", "512", "58,490,880"]]


def test_params_shows_what_a_latent_moe_replaces(capsys):
    assert params.main(["model=nemotron3_super"]) == 0
    shown = capsys.readouterr().out
    for expected in ("22 of 512", "129,499,136", "6 of 128", "132,120,576", "24 of 512", "140,509,184"):
        assert expected in shown, f"{expected} is missing in\n{shown}"
