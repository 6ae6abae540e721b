"""One optimizer step: the layout of the work must not change its result."""

import pytest
import torch

from nemohybrid.config.training import OptimSection
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import gradient_norm
from nemohybrid.parallel.layout import layout_of
from nemohybrid.train.batch import Batch
from nemohybrid.train.optimizer import build_optimizer
from nemohybrid.train.step import compute_gradients, update

ALONE = ParallelContext.single()
EXACT = {"rtol": 1e-4, "atol": 1e-6}  # fp32, another order of summation


@pytest.fixture
def model(configure) -> HybridModel:
    return HybridModel.create(configure('model.pattern="M-*E"', "model.num_experts=4").model, seed=3)


@pytest.fixture
def batch() -> Batch:
    """Four rows whose masks keep 32, 1, 17 and 0 tokens: a mean over microbatches would weigh them wrongly."""
    tokens = torch.randint(0, 257, (4, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 32)
    for row, kept in enumerate((32, 1, 17, 0)):
        mask[row, :kept] = 1
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, None)


def gradients(model: HybridModel, batch: Batch, microbatch: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = compute_gradients(model, batch, microbatch, ALONE)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters())), "a parameter has no gradient"
    return loss.item(), grads


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_microbatches_give_the_loss_and_gradients_of_the_whole_batch(model, batch, microbatch):
    loss, grads = gradients(model, batch, 4)
    split_loss, split_grads = gradients(model, batch, microbatch)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, f"{name}: no gradient"
        torch.testing.assert_close(split_grads[name], grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_the_loss_is_the_mean_cross_entropy_of_the_unmasked_tokens(model, batch):
    logits = model(batch.tokens).double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    expected = losses[batch.loss_mask.flatten().bool()].mean().item()
    assert gradients(model, batch, 2)[0] == pytest.approx(expected, rel=1e-5)


def test_a_masked_label_has_no_influence(model, batch):
    _, grads = gradients(model, batch, 4)
    labels = torch.where(batch.loss_mask.bool(), batch.labels, 0)
    _, other = gradients(model, Batch(batch.tokens, labels, batch.loss_mask, None), 4)
    for name, grad in grads.items():
        assert torch.equal(grad, other[name]), name


def test_recomputing_layers_changes_no_bit(model, batch):
    loss, grads = gradients(model, batch, 2)
    model.recompute = True
    again, recomputed = gradients(model, batch, 2)
    assert again == loss
    for name, grad in grads.items():
        assert torch.equal(grad, recomputed[name]), f"{name} differs when its layer is computed twice"


def test_recompute_keeps_fewer_activations(model, batch):
    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(batch.tokens)
        return sum(sizes)

    everything = kept()
    model.recompute = True
    assert kept() < everything / 2, "recompute=layer saves no memory"


def test_a_step_without_gradient_shrinks_the_matrices_alone(model, configure):
    """With Adam's moments at zero, weight decay is all that moves a weight: w (1 - lr * decay)."""
    config = configure("optim.lr=0.1", "optim.weight_decay=0.5")
    optimizer = build_optimizer(model.parameters(), config.optim)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(model.parameters(), optimizer, clip=1.0, norm=torch.tensor(0.0))
    for name, parameter in model.named_parameters():
        decayed = len(layout_of(parameter).shape) > 1
        assert decayed == (parameter.dim() > 1), f"{name} is decayed by another shape than its own"
        factor = 1 - 0.1 * 0.5 if decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=name)
    vectors = [n for n, p in model.named_parameters() if p.dim() == 1]
    assert {"A_log", "D", "dt_bias"} <= {name.rpartition(".")[2] for name in vectors}


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_scales_to_the_limit_by_the_norm_before(model, batch, monkeypatch, limit):
    gradients(model, batch, 4)
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    optimizer = build_optimizer(model.parameters(), OptimSection())
    seen = {}
    monkeypatch.setattr(
        optimizer, "step", lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    measured = gradient_norm(model.parameters())
    assert measured.item() == pytest.approx(norm, rel=1e-5)
    update(model.parameters(), optimizer, limit, measured)
    clipped = torch.cat([g.flatten() for g in seen.values()]).norm().item()
    assert clipped == pytest.approx(min(limit, norm), rel=1e-4)
    assert all(p.grad is None for p in model.parameters()), "gradients would add up over steps"
