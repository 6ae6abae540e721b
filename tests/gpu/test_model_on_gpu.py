"""The same model on a GPU and on the CPU."""

import pytest
import torch
from torch import Tensor

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.model import ModelConfig
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import logical_parameters
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import loss_weights, summed_losses, target_counts

MODELS = ["tiny", "tiny_moe", "tiny_latent_mtp", "quickstart"]
LENGTHS = [[30, 40, 30], [100]]
"""Documents of two packed rows, none of which begins where a chunk of the scan does."""
BF16_LOSS, BF16_WORST, BF16_MEDIAN = 2e-4, 0.2, 0.035
"""Twice what bf16 differs from fp32 on the CPU, relative: the loss; in L2 norm the worst of all gradients, which is a
`dt_bias`, an `A_log`, or an expert that lost a token to its neighbour; and the gradient in the middle."""


def configured(name: str, dtype: str) -> ModelConfig:
    return load_model_config([f"model={name}", "model.vocab_size=97", f"model.dtype={dtype}"]).model


def loss_and_gradients(name: str, device: str, dtype: str, packed: bool = True) -> tuple[float, dict[str, Tensor]]:
    model = HybridModel.create(configured(name, dtype), seed=3, context=ParallelContext.single(device))
    ids = torch.randint(97, (2, 101), generator=torch.Generator().manual_seed(0)).to(device)
    seq = SequenceContext.packed(LENGTHS, device) if packed else None
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:]).float(), seq.document_ids if seq else None)
    losses = summed_losses(model, batch, share=1.0)
    assert losses.device.type == torch.device(device).type
    loss = (losses * loss_weights(target_counts(batch, model.mtp_depth), model.config.mtp.loss_weight)).sum()
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    missing = dict(model.named_parameters()).keys() - gradients.keys()
    assert not missing, f"no gradient reaches {sorted(missing)}"
    return loss.item(), gradients


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[tuple[float, str]]:
    """Relative difference in L2 norm of every gradient, the smallest first."""
    return sorted(((found[name] - want).norm().item() / want.norm().item(), name) for name, want in expected.items())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_on_the_cpu_in_fp32(device, name, packed):
    expected_loss, expected = loss_and_gradients(name, "cpu", "float32", packed)
    loss, found = loss_and_gradients(name, device, "float32", packed)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    error, where = differences(found, expected)[-1]
    assert error < 1e-3, f"{where}: {error:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_close_to_fp32_as_its_rounding(device, name):
    expected_loss, expected = loss_and_gradients(name, "cpu", "float32")
    loss, found = loss_and_gradients(name, device, "bfloat16")
    assert loss == pytest.approx(expected_loss, rel=BF16_LOSS)
    errors = differences(found, expected)
    assert errors[-1][0] < BF16_WORST, errors[-5:]
    assert errors[len(errors) // 2][0] < BF16_MEDIAN, errors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_two_bf16_passes_are_bitwise_equal(device, name, packed):
    first, second = (loss_and_gradients(name, device, "bfloat16", packed) for _ in range(2))
    assert first[0] == second[0]
    different = [name for name, gradient in first[1].items() if not torch.equal(gradient, second[1][name])]
    assert not different, f"gradients that change from run to run: {different}"


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_do_not_depend_on_the_device(device, name):
    on_cpu = logical_parameters(HybridModel.create(configured(name, "float32"), seed=5))
    there = HybridModel.create(configured(name, "float32"), seed=5, context=ParallelContext.single(device))
    for parameter, value in logical_parameters(there).items():
        assert value.device.type == torch.device(device).type, parameter
        assert torch.equal(value.cpu(), on_cpu[parameter]), parameter


def test_recomputing_layers_changes_no_bit(device):
    def gradients(recompute: bool) -> dict[str, Tensor]:
        model = HybridModel.create(configured("tiny_moe", "bfloat16"), context=ParallelContext.single(device))
        model.recompute = recompute
        model(torch.arange(50, device=device).view(1, 50)).float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept, computed_again = gradients(False), gradients(True)
    for name, gradient in kept.items():
        assert torch.equal(computed_again[name], gradient), name
