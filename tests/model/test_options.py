"""Every option of a layer does what it says, by a formula written another way."""

import pytest
import torch
import torch.nn.functional as F

from nemohybrid.config.model import AttentionConfig, ModelConfig
from nemohybrid.errors import ConfigError
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.rope import rotate


def mixer_of(model):
    return model.layers[0].mixer


def hidden(tokens: int = 12, seed: int = 3):
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(seed))


def test_a_layer_adds_the_mixer_of_the_norm_to_the_stream(tiny_model):
    layer, x, seq = tiny_model("-").layers[0], hidden(), SequenceContext(1, 12)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    torch.testing.assert_close(layer(x, seq), x + layer.mixer(normed, seq), rtol=1e-5, atol=1e-5)


def test_the_mlp_squares_the_relu(tiny_model):
    mlp, x = mixer_of(tiny_model("-")), hidden()
    want = (x @ mlp.fc1.weight.T).clamp(min=0).pow(2) @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x, SequenceContext(1, 12)), want, rtol=1e-5, atol=1e-5)


def test_swiglu_gates_with_silu_of_the_first_half(tiny_model):
    mlp, x = mixer_of(tiny_model("-", activation="swiglu")), hidden()
    gate, up = mlp.fc1.weight[:40], mlp.fc1.weight[40:]
    want = (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.fc2.weight.T
    torch.testing.assert_close(mlp(x, SequenceContext(1, 12)), want, rtol=1e-5, atol=1e-5)


def mamba_by_hand(mixer, x):
    """The Mamba-2 mixer for one row, in float64, one token after another."""
    x, heads, groups, inner = x.double(), mixer.heads, mixer.groups, mixer.inner
    w = {name: p.double() for name, p in mixer.named_parameters()}
    zxbcdt = x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    z, xbc, dt = zxbcdt.split([inner, w["conv.weight"].shape[0], heads], dim=-1)
    taps = w["conv.weight"].shape[1]
    padded = torch.cat([xbc.new_zeros(taps - 1, xbc.shape[1]), xbc])
    xbc = torch.stack([(padded[t : t + taps] * w["conv.weight"].T).sum(0) for t in range(len(x))])
    xbc = F.silu(xbc + w.get("conv.bias", 0))
    dt = F.softplus(dt + w["dt_bias"])
    if mixer.dt_limit:
        dt = dt.clamp(*mixer.dt_limit)
    xs, B, C = xbc.split([inner, (xbc.shape[1] - inner) // 2, (xbc.shape[1] - inner) // 2], dim=-1)
    xs = xs.unflatten(-1, (heads, -1))
    B, C = (t.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for t in (B, C))
    state, rows = 0, []
    for t in range(len(x)):
        decay = torch.exp(-dt[t] * w["A_log"].exp())[:, None, None]
        state = decay * state + (dt[t, :, None] * xs[t])[..., None] * B[t, :, None]
        rows.append((state * C[t, :, None]).sum(-1) + w["D"][:, None] * xs[t])
    gated = (torch.stack(rows).flatten(1) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * w["norm.weight"]
    return normed @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_bias": False},
        {"conv_kernel": 1},
        {"conv_kernel": 2},
        {"conv_kernel": 9},
        {"dt_limit": [0.01, 0.05]},
        {"linear_bias": True},
        {"mamba_num_groups": 1},
        {"mamba_num_groups": 4},
        {"chunk_size": 5},
        {"chunk_size": None},
    ],
    ids=str,
)
def test_mamba_is_its_recurrence(changes, tiny_model):
    mixer, x = mixer_of(tiny_model("M", **changes)), hidden(21)
    if "dt_limit" in changes:
        assert mixer.time_steps(torch.tensor([-9.0, 9.0]).expand(4, 2).T).aminmax() == (
            torch.tensor(0.01),
            torch.tensor(0.05),
        )
    torch.testing.assert_close(
        mixer(x, SequenceContext(1, 21)), mamba_by_hand(mixer, x).float(), rtol=1e-5, atol=1e-5, msg=str(changes)
    )


def test_time_steps_have_no_floor(tiny_model):
    dt = mixer_of(tiny_model("M")).time_steps(torch.full((1, 1, 4), -30.0))
    assert 0 < dt.max() < 1e-9, "transformers' floor of 1e-3 is not part of the model"


def test_linear_bias_reaches_every_projection_of_the_shared_kinds(tiny_model):
    names = dict(tiny_model("M*-", linear_bias=True).named_parameters())
    biases = sorted(name for name in names if name.endswith(".bias") and "conv" not in name)
    assert biases == [
        "layers.0.mixer.in_proj.bias",
        "layers.0.mixer.out_proj.bias",
        "layers.1.mixer.out_proj.bias",
        "layers.1.mixer.qkv.bias",
        "layers.2.mixer.fc1.bias",
        "layers.2.mixer.fc2.bias",
    ]


def attention_by_hand(mixer, q, k, v):
    """q [L, H, P]; k, v [L, K, P]: softmax over the past, head by head."""
    out = []
    for head in range(4):
        group = head // 2
        scores = (q[:, head] @ k[:, group].T / 10**0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v[:, group])
    return torch.cat(out, -1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("rope", [False, True])
def test_attention_shares_keys_among_the_heads_of_a_group(rope, tiny_model):
    """Rotation by hand: channel pairs (i, i + P/2) are complex numbers, turned by e^(i position frequency)."""
    options = AttentionConfig(position_embedding="rope", rope_theta=100.0) if rope else AttentionConfig()
    mixer, x = mixer_of(tiny_model("*", attention=options)), hidden()
    q, k, v = (p.unflatten(-1, (-1, 10)) for p in (x @ mixer.qkv.weight.T).split([40, 20, 20], -1))
    if rope:
        turn = torch.exp(1j * torch.arange(12)[:, None] * 100.0 ** (-torch.arange(5) / 5))[:, None]
        turned = [torch.complex(t[..., :5].contiguous(), t[..., 5:].contiguous()) * turn for t in (q, k)]
        q, k = (torch.cat([t.real, t.imag], -1).float() for t in turned)
    got = mixer(x, SequenceContext(1, 12))
    torch.testing.assert_close(got, attention_by_hand(mixer, q, k, v), rtol=1e-5, atol=1e-5)


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(at, distance):
        turned = [rotate(t, torch.tensor([[position]]), 50.0) for t, position in ((q, at), (k, at - distance))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(40, 7), product(9, 7), rtol=1e-4, atol=1e-4)
    assert (product(40, 7) - product(40, 3)).abs() > 0.1


def test_tied_embeddings_are_one_parameter_whose_gradient_is_the_sum(tiny_model, token_rows, gradients):
    tied, untied, ids = tiny_model("-", tie_embeddings=True), tiny_model("-"), token_rows(2, 9)
    assert [name for name, _ in tied.named_parameters() if "embedding" in name or "output" in name] == [
        "embedding.weight"
    ]
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(tied.get_parameter(name))
    both, each = gradients(tied, tied(ids)), gradients(untied, untied(ids))
    want = each["embedding.weight"] + each["output.weight"]
    torch.testing.assert_close(both["embedding.weight"], want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_vocabulary_padding_shows_no_logits_and_takes_no_gradient(tiny_model, token_rows, gradients):
    model, ids = tiny_model("-", vocab_multiple=32), token_rows(2, 9)
    assert model.embedding.weight.shape == model.output.weight.shape == (64, 24)
    logits = model(ids)
    assert logits.shape == (2, 9, 61)
    for name, gradient in gradients(model, logits).items():
        if name in ("embedding.weight", "output.weight"):
            assert gradient[61:].count_nonzero() == 0, f"{name}: padding rows are trained"
            assert gradient[:61].count_nonzero() > 0


def test_unset_sizes_are_refused_before_a_model_without_width_is_built():
    with pytest.raises(ConfigError, match=r"model\.num_attention_heads.*derive_sizes"):
        HybridModel(ModelConfig(pattern="*"))
