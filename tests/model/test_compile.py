"""torch.compile takes a layer as one graph, forward and backward, and the graph computes what the layer does."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from nemohybrid.config.kernels import KernelsSection
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.kernels import bind_kernels
from nemohybrid_kernels.moe import grouped, products

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, tracing
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, LENGTH, HIDDEN = 1, 19, 24  # a chunk of 16, which the kernels make of 8, and a ragged one
SMALL = {"mamba_num_heads": 2, "mamba_num_groups": 1}
TORCH = {
    "mixer_backend": "separate",
    "ssd_backend": "torch",
    "conv1d_backend": "torch",
    "norm_backend": "torch",
    "attention_backend": "torch",
}
TRITON = {"ssd_backend": "triton", "conv1d_backend": "triton", "norm_backend": "triton"}
BACKENDS = {"torch": TORCH, "triton": TRITON | {"mixer_backend": "triton"}}
LOCKED = pytest.mark.xfail(
    sys.version_info < (3, 12),
    strict=True,
    raises=torch._dynamo.exc.Unsupported,
    reason="functools.cached_property takes a lock in Python 3.11, which is not traced (attention/packing.py, moe/visits.py)",
)

NESTED = pytest.mark.xfail(
    strict=True,
    raises=torch._dynamo.exc.Unsupported,
    reason="the backward pass calls torch.autograd.grad, which is not traced (moe/activation.py, activate_backward)",
)


def bound(model: HybridModel, backends: dict[str, str], dtype=torch.float32) -> nn.Module:
    """The only layer of a model."""
    bind_kernels(model.to(DEVICE), KernelsSection(**backends), DEVICE, dtype, packed=True)
    return model.layers.get_submodule("0")


def context(documents: bool, share: float | None) -> SequenceContext:
    ids = (torch.arange(LENGTH, device=DEVICE) >= 9).int()[None] if documents else None
    return SequenceContext(ROWS, LENGTH, ids, share=share)


def results(
    run: Callable[..., Tensor], layer: nn.Module, seq: SequenceContext, dtype=torch.float32
) -> dict[str, Tensor]:
    """The layer's output, and the gradients of its input and of every parameter."""
    g = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(ROWS * LENGTH, HIDDEN, generator=g).to(DEVICE, dtype) for _ in "xy")
    x.requires_grad_()
    layer.zero_grad()
    y = run(x, seq)
    y.backward(slope)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    return {"output": y.detach(), "x": x.grad, **gradients}


def assert_one_graph(layer: nn.Module, documents: bool, share: float | None, dtype=torch.float32) -> None:
    """`fullgraph` raises at the first break. The backward pass is traced too, and the graph then runs as it is."""
    torch.compiler.reset()
    wanted = results(layer, layer, context(documents, share), dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = results(compiled, layer, context(documents, share), dtype)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symbol", "M-")
def test_a_layer_is_one_graph(symbol, backend, documents, tiny_model):
    assert_one_graph(bound(tiny_model(symbol, **SMALL), BACKENDS[backend]), documents, share=0.5)


def test_a_mamba_layer_of_separate_triton_operators_is_one_graph(tiny_model):
    assert_one_graph(bound(tiny_model("M", **SMALL), TRITON | {"mixer_backend": "separate"}), documents=True, share=0.5)


@pytest.mark.parametrize("documents", [False, pytest.param(True, marks=LOCKED)], ids=["one document", "documents"])
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_an_attention_layer_is_one_graph(backend, documents, tiny_model):
    assert_one_graph(bound(tiny_model("*"), {"attention_backend": backend}), documents, share=0.5)


@pytest.mark.parametrize(
    "backend", [pytest.param("torch", marks=LOCKED), pytest.param("grouped", marks=NESTED), "triton"]
)
def test_an_experts_layer_is_one_graph_where_it_is_not_trained(backend, tiny_model, monkeypatch):
    """In bf16, and with the products of GPUs: those of CPUs need the loads on the host."""
    for module in (grouped, products):
        monkeypatch.setattr(module, "products_for", lambda *_: products.GROUPED_MM)
    dtype = torch.float32 if backend == "torch" else torch.bfloat16
    sizes = {"dtype": str(dtype).removeprefix("torch."), "moe_ffn_hidden_size": 16, "num_experts": 3}
    layer = bound(tiny_model("E", **sizes), TORCH | {"moe_backend": backend}, dtype)
    assert_one_graph(layer, documents=True, share=None, dtype=dtype)


@pytest.mark.xfail(
    strict=True,
    raises=torch._dynamo.exc.Unsupported,
    reason="the backward pass of the balancing loss counts in Python (model/moe/balance.py, RouterLosses.arrived)",
)
def test_an_experts_layer_is_one_graph_in_training(tiny_model):
    assert_one_graph(bound(tiny_model("E"), TORCH | {"moe_backend": "torch"}), documents=True, share=0.5)
