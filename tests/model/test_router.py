"""The router against megatron-core's recorded decisions and losses; the gradients of its losses against finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nemohybrid.config.model import RouterConfig
from nemohybrid.model import SequenceContext
from nemohybrid.model.moe.balance import balance_slope, z_loss
from nemohybrid.model.moe.router import Router
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.balance import LoadBalance

MEGATRON = {
    name: torch.from_numpy(a) for name, a in np.load(Path(__file__).parent / "fixtures/mcore_router.npz").items()
}
CASES = {
    "sigmoid_bias_k6": (6, RouterConfig(scaling_factor=2.5)),
    "sigmoid_bias_groups": (4, RouterConfig(groups=4, top_groups=2)),
    "softmax_post": (3, RouterConfig(score="softmax", expert_bias=False, normalize=True)),
    "softmax_pre": (3, RouterConfig(score="softmax", expert_bias=False, normalize=False)),
}
LENGTH = 10


def losses_on(kind: str, **options) -> RouterConfig:
    """Both losses, so heavy that the loss of the model would not hide them."""
    return RouterConfig(aux_loss=kind, aux_loss_weight=0.7, z_loss_weight=0.03, **options)


def router_losses(model, rows) -> list[torch.Tensor]:
    """What the routers add to the loss of a model, in the order of its layers, written another way and in float64.

    `global` on one rank and in one microbatch is `batch`.
    """
    seen: list[tuple[Router, torch.Tensor]] = []
    routers = [m for m in model.modules() if isinstance(m, Router)]
    hooks = [r.gate.register_forward_hook(lambda g, x, out, r=r: seen.append((r, out.double()))) for r in routers]
    model(rows)
    for hook in hooks:
        hook.remove()
    return [router_loss(router, logits) for router, logits in seen]


def router_loss(router: Router, logits: torch.Tensor) -> torch.Tensor:
    """Row by row, expert by expert."""
    options, experts = router.options, router.experts
    aux_weight = 0.0 if options.aux_loss == "none" else options.aux_loss_weight
    parts = logits.split(LENGTH) if options.aux_loss == "sequence" else [logits]
    total = options.z_loss_weight * torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    for part in parts:
        scores = part.sigmoid() if options.score == "sigmoid" else part.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        chosen = [row.argsort(descending=True)[: router.top_k].tolist() for row in part]
        for e in range(experts):
            share = sum(e in ids for ids in chosen) / (len(part) * router.top_k)
            total = total + aux_weight * experts * share * scores[:, e].mean() / len(parts)
    return total


def gradients_of_losses(model, rows, share: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients of the routers' losses alone: the output's gradient is zero."""
    model.zero_grad(set_to_none=True)
    (model(rows, SequenceContext(*rows.shape, share=share)) * 0.0).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def routers_of(model) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router)]


@pytest.mark.parametrize("case", CASES)
def test_the_router_decides_as_megatron_core_does(case, tiny_config):
    top_k, options = CASES[case]
    router = Router(tiny_config("E", hidden_size=16, num_experts=16, moe_top_k=top_k, router=options))
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(16))  # so that the input is the logits
        if router.expert_bias is not None:
            router.expert_bias.copy_(MEGATRON["bias"])
    ids, weights = router(MEGATRON["logits"])
    got = torch.zeros(64, 16).scatter(1, ids, weights)
    assert torch.equal(got > 0, MEGATRON[f"{case}.map"]), "other experts are chosen"
    torch.testing.assert_close(got, MEGATRON[f"{case}.probs"], rtol=1e-6, atol=1e-7)


def test_the_losses_are_those_of_megatron_core():
    """Its aux loss is recorded with weight 0.01 and the map of `sigmoid_bias_k6`, its z-loss with weight 0.001."""
    scores = MEGATRON["logits"].sigmoid()
    probabilities = (scores / scores.sum(-1, keepdim=True)).mean(0, keepdim=True)
    visits = MEGATRON["sigmoid_bias_k6.map"].sum(0, keepdim=True)
    loss = (balance_slope(visits, probabilities) * probabilities).sum()
    torch.testing.assert_close(0.01 * loss, MEGATRON["aux_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(0.001 * z_loss(MEGATRON["logits"]), MEGATRON["z_loss"], rtol=1e-6, atol=0)


def test_softmax_over_the_chosen_is_the_normalised_softmax_over_all():
    """exp(l_i) / sum over all, divided by the sum of it over the chosen: the first sum cancels. Why there is no option."""
    logits = MEGATRON["logits"].double()
    top = logits.topk(3, dim=-1)
    before = logits.softmax(-1).gather(1, top.indices)
    torch.testing.assert_close(before / before.sum(-1, keepdim=True), top.values.softmax(-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["none", "sequence", "batch", "global"])
def test_the_gradients_of_the_losses_are_those_of_finite_differences(kind, score, tiny_model, token_rows):
    """Through the whole model, along random directions of every parameter below a router; loads do not jump on the way."""
    model, rows = tiny_model("ME*E", router=losses_on(kind, score=score)), token_rows(3, LENGTH)
    got = gradients_of_losses(model, rows)
    for name in ("layers.1.mixer.router.gate.weight", "layers.3.mixer.router.gate.weight", "embedding.weight"):
        weight, slopes = model.get_parameter(name), []
        direction = (
            torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * got[name].abs().mean().sqrt()
        )
        direction = direction + got[name] / got[name].norm() * direction.norm()  # not by chance at right angles
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-3 / direction.norm() * direction
                slopes.append(sign * sum(router_losses(model, rows)))
                weight -= sign * 1e-3 / direction.norm() * direction
        slope = (sum(slopes) / 2e-3).item()
        want = ((got[name] * direction).sum() / direction.norm()).item()
        assert want == pytest.approx(slope, rel=1e-2), f"{name}: the loss does not rise as its gradient says"


def test_the_losses_of_a_layer_reach_what_it_read(tiny_model, token_rows):
    model, rows = tiny_model("ME", router=losses_on("sequence")), token_rows(3, LENGTH)
    want = torch.autograd.grad(sum(router_losses(model, rows)), [p for _, p in read_by_router(model)])
    got = gradients_of_losses(model, rows)
    for (name, _), gradient in zip(read_by_router(model), want, strict=True):
        assert gradient.abs().max() > 0, f"{name}: no gradient"
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    untouched = [n for n, g in got.items() if n.startswith(("layers.1.mixer.experts", "output")) and g.abs().max() > 0]
    assert not untouched, f"these come after the router: {untouched}"


def read_by_router(model):
    names = ("embedding", "layers.0", "layers.1.norm", "layers.1.mixer.router")
    return [(name, p) for name, p in model.named_parameters() if name.startswith(names)]


def test_without_a_share_of_a_training_step_nothing_is_added_or_counted(tiny_model, token_rows):
    model, rows = tiny_model("ME*E", router=losses_on("sequence")), token_rows(3, LENGTH)
    model(rows, SequenceContext(3, LENGTH)).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(rows).square().sum().backward()
    with torch.no_grad():
        model(rows, SequenceContext(3, LENGTH, share=1.0))
    model(rows, SequenceContext(3, LENGTH, share=1.0))  # no gradient ever arrives
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, plain[name]), name
    assert [r.losses.tally for r in routers_of(model)] == [None, None]


def test_the_output_of_a_training_step_is_that_of_any_other(tiny_model, token_rows):
    model, rows = tiny_model("ME*E", router=losses_on("sequence")), token_rows(3, LENGTH)
    assert torch.equal(model(rows, SequenceContext(3, LENGTH, share=1.0)), model(rows))


@pytest.mark.parametrize("size", [1, 2])
def test_the_sequence_and_z_losses_do_not_depend_on_the_microbatch(size, tiny_model, token_rows, assert_close_to_scale):
    model, rows = tiny_model("ME*E", router=losses_on("sequence")), token_rows(4, LENGTH)
    whole = gradients_of_losses(model, rows)
    parts = [gradients_of_losses(model, part, share=size / 4) for part in rows.split(size)]
    assert_close_to_scale({name: sum(part[name] for part in parts) for name in whole}, whole, 1e-5)


def test_the_global_loss_looks_at_the_microbatches_so_far(tiny_model, token_rows):
    """The second half of a batch is pushed by the loads of both: one row each, so that only their mean is left."""
    model, rows = tiny_model("E", router=RouterConfig(aux_loss="global", aux_loss_weight=0.7)), token_rows(2, LENGTH)
    router = routers_of(model)[0]
    gradients_of_losses(model, rows[:1], share=0.5)
    got = gradients_of_losses(model, rows[1:], share=0.5)["layers.0.mixer.router.gate.weight"]
    logits: list[torch.Tensor] = []
    hook = router.gate.register_forward_hook(lambda g, x, out: logits.append(out))
    model(rows)
    hook.remove()
    scores = logits[0].sigmoid()
    visits = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0).sum(0)
    mean = (scores / scores.sum(-1, keepdim=True))[LENGTH:].mean(0)
    want = torch.autograd.grad(0.5 * 0.7 * 6 * (visits / visits.sum() * mean).sum(), router.gate.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_token_counts_once_also_when_layers_are_computed_again(recompute, tiny_model, token_rows):
    model, rows = tiny_model("ME*E", router=losses_on("sequence")), token_rows(3, LENGTH)
    plain = gradients_of_losses(model, rows)
    tallies = [r.losses.tally for r in routers_of(model)]
    for router in routers_of(model):
        router.losses.tally = None
    model.recompute = recompute
    again = gradients_of_losses(model, rows)
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    for router, before in zip(routers_of(model), tallies, strict=True):
        tally = router.losses.tally
        assert tally.loads.sum() == tally.choices.sum() == 3 * LENGTH * 2, "3 rows of 10 tokens visit 2 experts each"
        assert tally.losses[2] == 1, "the whole batch"
        for ours, theirs in zip(vars(tally).values(), vars(before).values(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_values_of_the_losses_are_counted(tiny_model, token_rows):
    model, rows = tiny_model("E", router=losses_on("sequence")), token_rows(4, LENGTH)
    for part in rows.split(2):
        gradients_of_losses(model, part, share=0.5)
    tally = routers_of(model)[0].losses.tally
    want = router_losses(model, rows)[0].item()
    assert 0.7 * tally.losses[0].item() + 0.03 * tally.losses[1].item() == pytest.approx(want, rel=1e-5)


def test_loads_are_what_was_visited_and_the_loss_looks_at_the_scores_alone(tiny_model, token_rows):
    """With a bias, and with groups, other experts are visited than have the best scores; the loss must not see that."""
    for options in (losses_on("batch"), losses_on("batch", groups=3, top_groups=1)):
        model, rows = tiny_model("E", router=options), token_rows(3, LENGTH)
        router = routers_of(model)[0]
        router.expert_bias[4] = 5.0
        gradients_of_losses(model, rows)
        assert router.losses.tally.loads[4] == 3 * LENGTH, "every token visits expert 4"
        assert router.losses.tally.choices[4] < 3 * LENGTH
        value = router_losses(model, rows)[0].item()  # knows no bias
        assert 0.7 * router.losses.tally.losses[0].item() == pytest.approx(
            value - 0.03 * router.losses.tally.losses[1].item(), rel=1e-5
        )


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_forced_balance_gives_every_expert_the_same(top_k, tiny_model):
    options = RouterConfig(force_balance=True, normalize=False, scaling_factor=2.0)
    router = routers_of(tiny_model("E", moe_top_k=top_k, router=options))[0]
    x = torch.randn(12, 24, generator=torch.Generator().manual_seed(1))
    ids, weights = router(x)
    assert ids.flatten().bincount(minlength=6).tolist() == [12 * top_k // 6] * 6
    assert all(len(set(row)) == top_k for row in ids.tolist()), "an expert is visited twice"
    torch.testing.assert_close(weights, 2 * (x @ router.gate.weight.T).sigmoid().gather(1, ids))


def test_the_bias_stays_fp32_and_bitwise_when_the_model_is_cast(tiny_model):
    model = tiny_model("E")
    bias = routers_of(model)[0].expert_bias.clone()
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert routers_of(model)[0].expert_bias.dtype == torch.float32
    assert torch.equal(routers_of(model)[0].expert_bias, bias)


@pytest.mark.parametrize("kind", ["sequence", "batch", "global"])
def test_nothing_in_a_training_step_waits_for_the_device(kind, tiny_config):
    """On the meta device: to look at a number there, as a shape that depends on the loads would, is an error."""
    options = losses_on(kind, groups=3, top_groups=2)
    with torch.device("meta"):
        router = Router(tiny_config("E", router=options))
        x = torch.randn(20, 24, requires_grad=True)
    router(x, SequenceContext(2, LENGTH, share=0.5))[1].sum().backward()
    balance = LoadBalance(torch.nn.ModuleList([router]), ParallelContext.single("meta"))
    assert balance.collect().shape == (5,)
    balance.update_bias()
    assert router.gate.weight.grad is not None
