"""Norms inside and around mixers, and capped scores: against float64 by hand, alone and together with everything else."""

import math

import pytest
import torch
import torch.nn.functional as F

from nemohybrid.config.compose import load_config, load_model_config
from nemohybrid.config.model import AttentionConfig
from nemohybrid.errors import ConfigError
from nemohybrid.generate.engine import Decoder
from nemohybrid.model import SequenceContext
from nemohybrid.plan.memory import estimate
from nemohybrid_kernels.attention.reference import attention_torch

CAPPED = AttentionConfig(softcap=2.0)
QKV = AttentionConfig(qk_norm=True, v_norm=True)
EVERYTHING = {
    "attention": AttentionConfig(position_embedding="rope", qk_norm=True, v_norm=True, softcap=2.0),
    "no_input_norm": "*M",
    "output_norm": "M*-E",
    "mamba_bc_norm": True,
    "mamba_x_norm": True,
}
ATTENTION = {
    "qk": AttentionConfig(qk_norm=True),
    "v": AttentionConfig(v_norm=True),
    "cap": CAPPED,
    "qk rope": AttentionConfig(qk_norm=True, position_embedding="rope", rope_theta=100.0),
    "qkv cap rope": AttentionConfig(
        qk_norm=True, v_norm=True, softcap=2.0, position_embedding="rope", rope_theta=100.0
    ),
}
MAMBA = {
    "bc": {"mamba_bc_norm": True},
    "x": {"mamba_x_norm": True},
    "bcx": {"mamba_bc_norm": True, "mamba_x_norm": True},
}
KINDS = {
    "qk_norm": ("M*-", {"attention": AttentionConfig(qk_norm=True)}),
    "qkv_norm without input norm": ("M*-", {"attention": QKV, "no_input_norm": "*"}),
    "softcap": ("M*-", {"attention": CAPPED}),
    "bcx_norm without input norm": ("M*-", {**MAMBA["bcx"], "no_input_norm": "M"}),
    "output norms": ("M*-E", {"output_norm": "M*-E"}),
    "everything": ("M*-E*", EVERYTHING),
}
DOCUMENTS = torch.tensor([0] * 5 + [1] + [2] * 11)


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request, tiny_model):
    pattern, changes = request.param
    return tiny_model(pattern, **changes)


def hidden_rows(tokens: int = 17):
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(3))


def rms_by_hand(x, weights, name):
    """x, or its norm where there is a weight of that name."""
    if name not in weights:
        return x
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]


def turned_by_hand(t, theta):
    """t [L, H, P]: channel pairs (i, i + P/2) as complex numbers, turned by position in the document times frequency."""
    position = torch.cat([torch.arange(n) for n in DOCUMENTS.bincount().tolist()])
    half = t.shape[-1] // 2
    turn = torch.exp(1j * position[:, None].double() * theta ** (-torch.arange(half).double() / half))[:, None]
    out = torch.complex(t[..., :half].contiguous(), t[..., half:].contiguous()) * turn
    return torch.cat([out.real, out.imag], -1)


def attention_by_hand(options, w, x):
    """One row of DOCUMENTS, head by head, in float64."""
    q, k, v = (part.unflatten(-1, (-1, 10)) for part in (x @ w["qkv.weight"].T).split([40, 20, 20], -1))
    q, k, v = (rms_by_hand(t, w, f"{name}_norm.weight") for t, name in ((q, "q"), (k, "k"), (v, "v")))
    if options.position_embedding == "rope":
        q, k = (turned_by_hand(t, options.rope_theta) for t in (q, k))
    order = torch.arange(len(x))
    may_look = (order[:, None] >= order) & (DOCUMENTS[:, None] == DOCUMENTS)
    out = []
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].T / 10**0.5
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        out.append(scores.masked_fill(~may_look, -torch.inf).softmax(-1) @ v[:, head // 2])
    return torch.cat(out, -1) @ w["out_proj.weight"].T


def mamba_by_hand(w, x):
    """One row of DOCUMENTS, token by token, in float64; 4 heads of 6, 2 groups of 5 states, convolution over 4 tokens."""
    z, xbc, dt = (x @ w["in_proj.weight"].T).split([24, 44, 4], dim=-1)
    dt, a = F.softplus(dt + w["dt_bias"]), -w["A_log"].exp()
    state, rows = None, []
    for t in range(len(x)):
        begins = t == 0 or DOCUMENTS[t] != DOCUMENTS[t - 1]
        taps = [(i, s) for i, s in enumerate(range(t - 3, t + 1)) if s >= 0 and DOCUMENTS[s] == DOCUMENTS[t]]
        mixed = F.silu(sum(xbc[s] * w["conv.weight"][:, i] for i, s in taps) + w["conv.bias"])
        xs, b, c = mixed.split([24, 10, 10])
        xs = rms_by_hand(xs.view(4, 6), w, "x_norm.weight")
        b, c = (
            rms_by_hand(v.view(2, 5), w, f"{n}_norm.weight").repeat_interleave(2, 0) for v, n in ((b, "B"), (c, "C"))
        )
        state = 0 if begins else torch.exp(dt[t] * a)[:, None, None] * state
        state = state + (dt[t, :, None] * xs)[..., None] * b[:, None]
        rows.append((state * c[:, None]).sum(-1) + w["D"][:, None] * xs)
    gated = (torch.stack(rows).flatten(1) * F.silu(z)).unflatten(-1, (2, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * w["norm.weight"]
    return normed @ w["out_proj.weight"].T


def assert_equals_by_hand(module, x, call, by_hand):
    """Output, and gradient of input and of every parameter, none zero: within 2e-5 of the largest entry of float64's."""
    names = [name for name, _ in module.named_parameters()]
    weights = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    x, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = call(x), by_hand(weights, x64)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    got_all = [got, *torch.autograd.grad((got * upstream).sum(), [x, *module.parameters()])]
    want_all = [want, *torch.autograd.grad((want * upstream).sum(), [x64, *weights.values()])]
    for name, mine, theirs in zip(["output", "gradient of x", *names], got_all, want_all, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0, f"{name} is zero by hand"
        error = (mine.double() - theirs).abs().max().item()
        assert error <= 2e-5 * scale, f"{name}: off by {error:.1e}, its largest entry is {scale:.1e}"


@pytest.mark.parametrize("options", ATTENTION.values(), ids=list(ATTENTION))
def test_attention_with_norms_and_cap_is_what_the_formulas_say(options, tiny_model):
    mixer, seq = tiny_model("*", attention=options).layers[0].mixer, SequenceContext(1, 17, DOCUMENTS[None])
    assert_equals_by_hand(mixer, hidden_rows(), lambda x: mixer(x, seq), lambda w, x: attention_by_hand(options, w, x))


@pytest.mark.parametrize("changes", MAMBA.values(), ids=list(MAMBA))
def test_mamba_with_norms_is_its_recurrence(changes, tiny_model):
    mixer, seq = tiny_model("M", **changes).layers[0].mixer, SequenceContext(1, 17, DOCUMENTS[None])
    assert_equals_by_hand(mixer, hidden_rows(), lambda x: mixer(x, seq), mamba_by_hand)


@pytest.mark.parametrize("input_norm, output_norm", [(True, True), (False, True), (True, False)])
def test_a_layer_has_the_norms_it_was_asked_for(input_norm, output_norm, tiny_model):
    changes = {"no_input_norm": "" if input_norm else "-", "output_norm": "-" if output_norm else ""}
    layer = tiny_model("-", **changes).layers[0]

    def by_hand(w, x):
        read = rms_by_hand(x, w, "norm.weight")
        out = (read @ w["mixer.fc1.weight"].T).clamp(min=0).pow(2) @ w["mixer.fc2.weight"].T
        return x + rms_by_hand(out, w, "output_norm.weight")

    assert ("norm.weight" in dict(layer.named_parameters())) == input_norm
    assert_equals_by_hand(layer, hidden_rows(), lambda x: layer(x, SequenceContext(1, 17)), by_hand)


def test_output_norms_take_the_scale_of_a_mixer_out_of_the_stream(tiny_model):
    """Whatever size the projections grow to, what is added to the stream stays: the point of the option."""
    for symbol in "M*-E":
        layer, x = tiny_model(symbol, output_norm=symbol).layers[0], hidden_rows()
        before = layer(x, SequenceContext(1, 17))
        with torch.no_grad():
            for name, p in layer.mixer.named_parameters():
                if name in ("out_proj.weight", "fc2.weight", "experts.down", "shared_expert.fc2.weight"):
                    p.mul_(1000)
        torch.testing.assert_close(layer(x, SequenceContext(1, 17)), before, rtol=1e-3, atol=1e-3, msg=symbol)


@pytest.mark.parametrize("lengths", [[[17]], [[5, 1, 11]]], ids=["one document", "packed"])
def test_a_huge_cap_is_no_cap(lengths, tiny_model, token_rows, gradients, assert_close_to_scale):
    ids, seq = token_rows(1, 17), SequenceContext.packed(lengths) if len(lengths[0]) > 1 else None
    plain, capped = tiny_model("**"), tiny_model("**", attention=AttentionConfig(softcap=1e4))
    outputs = [model(ids, seq) for model in (plain, capped)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert_close_to_scale(gradients(capped, outputs[1]), gradients(plain, outputs[0]), 2e-5)


def test_capped_scores_are_fp32_under_bf16(tiny_model, token_rows):
    """A cap of 1e4 in bf16 would round scores to multiples of 64 if tanh were taken in it."""
    ids = token_rows(2, 17)
    plain, capped = (tiny_model("**", dtype="bfloat16", attention=AttentionConfig(softcap=cap)) for cap in (None, 1e4))
    want = plain(ids).float()
    assert (capped(ids).float() - want).abs().max() < 0.03 * want.abs().max(), "more than bf16 rounding apart"


def test_scores_that_bf16_cannot_tell_apart_are_told_apart():
    """256 and 257 times 1/sqrt(2): bf16 has no 257."""
    q, k = torch.tensor([[256.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    q, k, v = (t.to(torch.bfloat16)[None, None] for t in (q, k, torch.eye(2)))
    weights = attention_torch(q, k, v, mask=torch.ones(1, 1, 1, 2, dtype=torch.bool), softcap=1e5).flatten().float()
    assert weights[1] / weights[0] == pytest.approx(math.exp(2**-0.5), rel=0.01)


def test_a_cap_bounds_how_sure_attention_can_be(tiny_model):
    mixer = tiny_model("*", attention=AttentionConfig(softcap=0.5)).layers[0].mixer
    q, k = (torch.randn(1, heads, 9, 10, generator=torch.Generator().manual_seed(1)) * 100 for heads in (4, 2))
    v = torch.eye(9, 10).expand(1, 2, 9, 10)  # attention weights come out as they are
    weights = mixer._attend(q, k, v, None)[0, :, -1, :9]
    ratio = weights.amax(-1) / weights.amin(-1)
    assert ratio.max() < 2.7184, (
        "scores of a token differ by more than twice the cap, which is 1, so weights by more than e"
    )
    assert ratio.max() > 2.7, "the cap was not reached: this test would pass without one"


def test_packed_documents_equal_rows_of_their_own(model, token_rows, gradients, assert_close_to_scale):
    ids, split = token_rows(2, 21), [[5, 1, 13, 2], [11, 10]]
    packed = model(ids, SequenceContext.packed(split))
    rows = [torch.cat([model(doc[None])[0] for doc in row.split(n)]) for row, n in zip(ids, split, strict=True)]
    separate = torch.stack(rows)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5 * separate.abs().max().item())
    alone, together = gradients(model, separate), gradients(model, packed)
    assert_close_to_scale(together, alone, 3e-5)
    assert not [name for name, gradient in together.items() if not gradient.count_nonzero()], "a gradient is zero"


@pytest.mark.parametrize("first", [1, 7, 19])
def test_decoding_with_a_cache_is_the_full_forward(first, model, token_rows):
    ids = token_rows(2, 20)
    full, decoder, done = model(ids), Decoder(model), 0
    for length in [first] + [1] * (20 - first):
        logits = decoder.feed(ids[:, done : done + length])
        done += length
        off = (logits - full[:, done - 1]).abs().max()
        assert off < 1e-4, f"after {done} tokens: off by {off:.1e}"


def test_prompts_of_different_lengths_get_what_each_gets_alone(model):
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22]]
    together, alone = Decoder(model), [Decoder(model) for _ in prompts]
    logits = together.prefill(prompts)
    each = torch.cat([decoder.prefill([prompt]) for decoder, prompt in zip(alone, prompts, strict=True)])
    for step in range(3):
        off = (logits - each).abs().max()
        assert off < 1e-4, f"step {step}: off by {off:.1e}"
        tokens = logits.argmax(-1)
        logits = together.feed(tokens[:, None])
        each = torch.cat([decoder.feed(token.view(1, 1)) for decoder, token in zip(alone, tokens, strict=True)])


def test_recomputation_changes_no_gradient(model, token_rows, gradients):
    ids = token_rows(2, 12)
    kept = gradients(model, model(ids))
    model.recompute = True
    again = gradients(model, model(ids))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


WRONG = {
    'model.no_input_norm="Q"': "no layer of the pattern is 'Q'.*some of M-",
    'model.output_norm="-E"': r"no layer of the pattern is 'E'.*some of M-\*",
    'model.no_input_norm="*"': "model.attention.qk_norm=true.*model.attention.v_norm=true",
    'model.no_input_norm="M"': "model.mamba_bc_norm=true.*model.mamba_x_norm=true",
    'model.no_input_norm="-"': "model.output_norm=with '-'",
    'model.pattern="ME" model.no_input_norm="E" model.output_norm="E"': "without 'E'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_layer_that_normalises_nothing_is_refused_with_the_cure(words):
    with pytest.raises(ConfigError, match=WRONG[words]):
        load_model_config(["model=tiny", *words.split()])


RIGHT = [
    'model.no_input_norm="*" model.attention.qk_norm=true model.attention.v_norm=true',
    'model.no_input_norm="*-" model.output_norm="*-" model.attention.qk_norm=true',
    'model.no_input_norm="M" model.mamba_bc_norm=true model.mamba_x_norm=true',
    'model.pattern="M-/*-" model.output_norm="*"',
]


@pytest.mark.parametrize("words", RIGHT)
def test_a_layer_that_normalises_inside_or_behind_needs_no_input_norm(words):
    load_model_config(["model=tiny", *words.split()])


def test_the_memory_of_capped_scores_is_expected():
    run = ["model=tiny", 'model.pattern="*"', "data=shakespeare", "train.global_batch=2", "data.sequence_length=128"]
    plain, capped = (estimate(load_config([*run, *extra]), 1).total for extra in ([], ["model.attention.softcap=50"]))
    config = load_config(run).model
    scores = 2 * (config.num_attention_heads or 0) * 128**2 * 4
    assert capped - plain >= scores, "fp32 scores are kept for the backward pass, and the plan must say so"
