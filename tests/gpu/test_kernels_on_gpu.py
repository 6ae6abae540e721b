"""Every operator of nemohybrid_kernels on a GPU and on the CPU: values, and gradients of every floating input.

The reference in fp32 on the CPU is right by the tests of tests/kernels; what is held to it here is the same call on
another device, with whatever backend that device chooses.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemohybrid_kernels.activation import squared_relu
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.cross_entropy import cross_entropy
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.norm import gated_rms_norm, rms_norm
from nemohybrid_kernels.ssd import ssd_scan

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Of the largest entry of the fp32 result: sums in another order; twice what bf16 differs on the CPU."""

BATCH, LENGTH, HEADS, WIDTH, GROUPS, STATE = 2, 150, 4, 16, 2, 32
DOCUMENTS = torch.tensor([[70, 80], [1, 149]])
ALWAYS_FP32 = ("dt", "A", "D", "initial_state", "expert_weights")

Arguments = dict[str, Tensor]
Case = tuple[Callable[..., Any], Arguments]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def document_ids() -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in DOCUMENTS]).to(torch.int32)


def scan() -> Case:
    arguments = {
        "x": draw(BATCH, LENGTH, HEADS, WIDTH, seed=0),
        "dt": F.softplus(draw(BATCH, LENGTH, HEADS, seed=1)),
        "A": -draw(HEADS, seed=2).exp(),
        "B": draw(BATCH, LENGTH, GROUPS, STATE, seed=3),
        "C": draw(BATCH, LENGTH, GROUPS, STATE, seed=4),
        "D": draw(HEADS, seed=5),
        "initial_state": draw(BATCH, HEADS, WIDTH, STATE, seed=6),
    }
    return ssd_scan, arguments


def packed_scan() -> Case:
    operator, arguments = scan()
    return operator, arguments | {"document_ids": document_ids()}


def convolution() -> Case:
    weight, bias, before = draw(WIDTH, 4, seed=1), draw(WIDTH, seed=2), draw(BATCH, 3, WIDTH, seed=3)
    x = draw(BATCH, LENGTH, WIDTH, seed=0)
    return causal_conv1d, {"x": x, "weight": weight, "bias": bias, "initial_state": before}


def packed_convolution() -> Case:
    operator, arguments = convolution()
    return operator, arguments | {"document_ids": document_ids()}


def norm() -> Case:
    return lambda x, weight: rms_norm(x, weight, 1e-5), {"x": draw(9, 64, seed=0), "weight": draw(64, seed=1)}


def gated_norm() -> Case:
    arguments = {"x": draw(9, 64, seed=0), "z": draw(9, 64, seed=1), "weight": draw(64, seed=2)}
    return lambda x, z, weight: gated_rms_norm(x, z, weight, group_size=16, eps=1e-5), arguments


def activation() -> Case:
    return squared_relu, {"h": draw(9, 5, 64, seed=0)}


def experts() -> Case:
    scores = draw(50, 6, seed=1).index_fill(1, torch.tensor(4), -10.0)  # nobody visits expert 4
    weights, ids = scores.softmax(-1).topk(2)
    up, down = draw(6, 24, 16, seed=2) / 4, draw(6, 16, 24, seed=3) / 5
    operands = {"x": draw(50, 16, seed=0), "expert_ids": ids, "expert_weights": weights, "up": up, "down": down}
    return lambda **tensors: expert_mlp(**tensors, activation=lambda x: x.relu().square()), operands


def experts_and_nobody() -> Case:
    """A third of the visits are to nobody: rows behind those of the last expert, which grouped_mm leaves alone."""
    _, operands = experts()
    nobody = torch.arange(100).view(50, 2) % 3 == 0
    operands["expert_ids"] = operands["expert_ids"].masked_fill(nobody, 6)
    return lambda **tensors: expert_mlp(**tensors, activation=lambda x: x.relu().square(), absent=True), operands


def loss() -> Case:
    labels = torch.randint(1000, (300,), generator=torch.Generator().manual_seed(1))
    return cross_entropy, {"logits": 3 * draw(300, 1000, seed=0), "labels": labels}


MIXER_CASES = [scan, packed_scan, convolution, packed_convolution, norm, gated_norm]
CASES = [*MIXER_CASES, activation, experts, experts_and_nobody, loss]


def placed(name: str, value: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """An argument of its own on `device`: floating ones in `dtype`, where the operator takes it, and with gradient."""
    if not value.is_floating_point():
        return value.to(device)
    return value.detach().to(device, torch.float32 if name in ALWAYS_FP32 else dtype, copy=True).requires_grad_()


def results(case: Callable[[], Case], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output and every gradient, on the CPU in fp32; output gradients are drawn alike everywhere."""
    operator, arguments = case()
    inputs = {name: placed(name, value, device, dtype) for name, value in arguments.items()}
    returned = operator(**inputs)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    assert all(out.device.type == torch.device(device).type for out in outputs)
    grads = [draw(*out.shape, seed=9 + i).to(out.device, out.dtype) for i, out in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    tensors = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for name, value in inputs.items():
        if value.requires_grad:
            assert value.grad is not None, f"no gradient reaches {name}"
            tensors[f"gradient of {name}"] = value.grad
    return {name: tensor.cpu().float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_values_and_gradients_equal_those_on_the_cpu(device, case, dtype):
    expected = results(case, "cpu", torch.float32)
    for name, tensor in results(case, device, dtype).items():
        error = (tensor - expected[name]).abs().max() / expected[name].abs().max()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_calls_agree_bitwise(device, case):
    first, second = (results(case, device, torch.bfloat16) for _ in range(2))
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, f"results that change from call to call: {different}"
