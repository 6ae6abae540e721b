"""The same model on a GPU and on the CPU. Skipped, and counted as skipped, where there is no GPU."""

import pytest
import torch

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import ModelConfig
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.layout import logical_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def every_layer_kind(dtype: str) -> ModelConfig:
    config = ModelConfig(pattern="M-*ME", hidden_size=64, vocab_size=97, ssm_state_size=16, dtype=dtype)
    derive_sizes(config)
    return config


def loss_and_gradients(device: str, dtype: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = HybridModel.create(every_layer_kind(dtype), seed=3, context=ParallelContext.single(device))
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(0)).to(device)
    seq = SequenceContext.packed([[30, 40], [70]], device)
    loss = torch.nn.functional.cross_entropy(model(ids, seq).float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return loss.item(), gradients


def test_gradients_on_a_gpu_equal_those_on_the_cpu_in_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False
    expected_loss, expected = loss_and_gradients("cpu", "float32")
    loss, found = loss_and_gradients("cuda", "float32")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in found.items():
        error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-3, f"{name}: {error:.1e}"


def test_two_bf16_passes_on_a_gpu_are_bitwise_equal():
    first, second = loss_and_gradients("cuda", "bfloat16"), loss_and_gradients("cuda", "bfloat16")
    assert first[0] == second[0]
    different = [name for name, gradient in first[1].items() if not torch.equal(gradient, second[1][name])]
    assert not different, f"gradients that change from run to run: {different}"


def test_initial_weights_do_not_depend_on_the_device():
    on_cpu = HybridModel.create(every_layer_kind("float32"), seed=5)
    on_gpu = HybridModel.create(every_layer_kind("float32"), seed=5, context=ParallelContext.single("cuda"))
    for name, value in logical_parameters(on_gpu).items():
        assert torch.equal(value.cpu(), logical_parameters(on_cpu)[name]), name
