"""Operators and layers can be captured in a CUDA graph: nothing waits for the host, and a replay computes what a call does."""

from collections.abc import Callable

import pytest
import torch
from host_waits import nothing_waits
from torch import Tensor, nn

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import ModelConfig
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.attention import Attention
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.train.canary_cases import Calls, attention_case, cases_of
from nemohybrid_kernels.canary import Case
from nemohybrid_kernels.launching import recording
from nemohybrid_kernels.moe import grouped, products

Run = Callable[..., Tensor | tuple[Tensor, ...]]
CPU = torch.device("cpu")
OPERATORS = (
    "mamba2_mixer",
    "ssd_scan",
    "causal_conv1d",
    "rms_norm",
    "gated_rms_norm",
    "attention",
    "expert_mlp",
    "cross_entropy",
)
EXPERTS_CAPTURE = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
"""Before Hopper grouped_mm waits for the host."""
TRITON = {f"{name}_backend": "triton" for name in ("ssd", "conv1d", "norm", "moe", "cross_entropy")}
SIZES = {
    "hidden_size": 256,
    "vocab_size": 512,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "mamba_num_groups": 2,
    "ssm_state_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 64,
    "num_experts": 8,
    "moe_ffn_hidden_size": 128,
}


def model_of(pattern: str, device: torch.device) -> HybridModel:
    config = ModelConfig(pattern=pattern, **SIZES)
    derive_sizes(config)
    return HybridModel.create(config).to(device)


def case_of(operator: str, model: nn.Module, device: torch.device, packed: bool, chunk_size: int | None = None) -> Case:
    """How a layer of `model` calls the operator: with our kernels, or with those of PyTorch that GPUs have."""
    fused = "triton" if operator == "mamba2_mixer" else "separate"
    bind_kernels(model, KernelsSection(mixer_backend=fused, **TRITON), device, torch.bfloat16, packed)
    calls = Calls.of(torch.bfloat16, device, packed, chunk_size)
    if operator == "attention":
        return attention_case(next(module for module in model.modules() if isinstance(module, Attention)), calls)
    return next(case for case in cases_of(model, calls) if case.operator == operator)


def forward_and_backward(run: Run, given: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of all floating inputs, under output gradients that need no random numbers."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in given.items()}
    returned = run(**leaves)
    out = returned[0] if isinstance(returned, tuple) else returned
    wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]
    slope = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, slope)]


class Captured:
    """A call on tensors that stay where they are: new inputs are copied there, and the graph is started again."""

    def __init__(self, run: Run, given: dict[str, Tensor]) -> None:
        self.given = {name: tensor.clone() for name, tensor in given.items()}
        self.graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, and allocates what is allocated once
            for _ in range(3):
                forward_and_backward(run, self.given)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.results = forward_and_backward(run, self.given)

    def __call__(self, given: dict[str, Tensor]) -> list[Tensor]:
        for name, tensor in given.items():
            self.given[name].copy_(tensor)
        self.graph.replay()
        return [result.clone() for result in self.results]


def assert_replays(run: Run, given: dict[str, Tensor]) -> None:
    """The first inputs again, and others in their place: documents that begin elsewhere, too."""
    captured = Captured(run, given)
    others = {n: t.flip(1) if n == "document_ids" else t.roll(1, 0) if t.dim() > 1 else t for n, t in given.items()}
    for inputs in (given, others, given):
        for got, wanted in zip(captured(inputs), forward_and_backward(run, inputs), strict=True):
            assert got.isfinite().all()
            scale = wanted.abs().max().clamp_min(1e-6)
            assert (got - wanted).abs().max() <= 1e-5 * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", [of for of in OPERATORS if of != "expert_mlp" or EXPERTS_CAPTURE])
def test_a_captured_operator_computes_what_a_call_does(operator):
    device = torch.device("cuda")
    packed = operator != "attention"  # of its backends those that know documents may wait: docs/kernels.md
    case = case_of(operator, model_of("M*E", device), device, packed)
    assert_replays(case.run, {name: tensor.to(device) for name, tensor in case.inputs().items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", ["triton", "separate"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "documents"])
def test_a_captured_mamba_layer_computes_what_a_call_does(fused, packed):
    device, length = torch.device("cuda"), 301
    model = model_of("M", device)
    bind_kernels(model, KernelsSection(mixer_backend=fused), device, torch.bfloat16, packed)
    layer = model.layers.get_submodule("0")
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, document_ids: Tensor | None = None, **weights: Tensor) -> Tensor:
        seq = SequenceContext(2, length, document_ids)
        return torch.func.functional_call(layer, weights, (x, seq))

    given = {"x": torch.randn(2 * length, SIZES["hidden_size"], device=device, dtype=torch.bfloat16), **parameters}
    if packed:
        given["document_ids"] = (
            torch.arange(length, device=device) >= torch.tensor([[90], [200]], device=device)
        ).int()
    assert_replays(run, {name: tensor.detach() for name, tensor in given.items()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the captures show it")
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_operator_waits_for_the_host(operator, packed, tiny_model, monkeypatch):
    """Of those for GPUs. Their kernels are listed and not run: it is the host's code that could wait."""
    pytest.importorskip("triton")
    for module in (grouped, products):
        monkeypatch.setattr(module, "products_for", lambda *_: products.GROUPED_MM)  # as on a GPU
    case = case_of(operator, tiny_model("M*E", moe_ffn_hidden_size=16), CPU, packed, chunk_size=8)
    given = case.inputs()
    with recording(90) as launches, nothing_waits():
        forward_and_backward(case.run, given)
    assert bool(launches) == (case.backend == "triton"), f"{case.name} started {len(launches)} kernels of ours"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the captures show it")
def test_what_waits_would_be_noticed(tiny_model):
    """The twin of the convolution asks how many documents there are, that of the experts how many tokens each has."""
    for operator in ("causal_conv1d", "expert_mlp"):
        case = case_of(operator, tiny_model("ME"), CPU, packed=True, chunk_size=8)
        with pytest.raises(AssertionError, match="waits for the device"), nothing_waits():
            forward_and_backward(case.twin, case.inputs())
