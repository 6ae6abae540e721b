"""torch.compile takes a layer as one graph, forward and backward, and the graph computes what the layer does."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import RouterConfig
from nemohybrid.model import HybridModel, SequenceContext
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.model.moe.balance import RouterLosses
from nemohybrid.model.moe.router import Router
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import summed_losses
from nemohybrid_kernels.moe import grouped, products

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, tracing
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, LENGTH, HIDDEN = 1, 19, 24  # a chunk of 16, which the kernels make of 8, and a ragged one
SMALL = {"mamba_num_heads": 2, "mamba_num_groups": 1}
TORCH: dict[str, Any] = {
    "mixer_backend": "separate",
    "ssd_backend": "torch",
    "conv1d_backend": "torch",
    "norm_backend": "torch",
    "activation_backend": "torch",
    "attention_backend": "torch",
}
TRITON = {f"{name}_backend": "triton" for name in ("ssd", "conv1d", "norm", "activation")}
BACKENDS = {"torch": TORCH, "triton": TRITON | {"mixer_backend": "triton"}}


def bound(model: HybridModel, backends: dict[str, Any], dtype=torch.float32) -> nn.Module:
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


def assert_one_graph(
    layer: nn.Module, documents: bool, share: float | None, dtype=torch.float32, backend: str = "aot_eager"
) -> None:
    """`fullgraph` raises at the first break. The backward pass is traced too, and "aot_eager" runs the graph as it is."""
    torch.compiler.reset()
    wanted = results(layer, layer, context(documents, share), dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    got = results(compiled, layer, context(documents, share), dtype)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symbol", "M-")
def test_a_layer_is_one_graph(symbol, backend, documents, tiny_model):
    assert_one_graph(bound(tiny_model(symbol, **SMALL), BACKENDS[backend]), documents, share=0.5)


def test_a_mamba_layer_of_separate_triton_operators_is_one_graph(tiny_model):
    assert_one_graph(bound(tiny_model("M", **SMALL), TRITON | {"mixer_backend": "separate"}), documents=True, share=0.5)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_an_attention_layer_is_one_graph(backend, documents, tiny_model):
    assert_one_graph(bound(tiny_model("*"), {"attention_backend": backend}), documents, share=0.5)


@pytest.mark.parametrize("backend", ["torch", "grouped", "triton"])
def test_an_experts_layer_is_one_graph_where_it_is_not_trained(backend, tiny_model, monkeypatch):
    """In bf16, and with the products of GPUs."""
    for module in (grouped, products):
        monkeypatch.setattr(module, "products_for", lambda *_: products.GROUPED_MM)
    dtype = torch.float32 if backend == "torch" else torch.bfloat16
    sizes = {"dtype": str(dtype).removeprefix("torch."), "moe_ffn_hidden_size": 16, "num_experts": 3}
    layer = bound(tiny_model("E", **sizes), TORCH | {"moe_backend": backend}, dtype)
    assert_one_graph(layer, documents=True, share=None, dtype=dtype)


LOSSES = {
    "losses": RouterConfig(aux_loss="sequence", aux_loss_weight=0.7, z_loss_weight=0.03),
    "losses without weight": RouterConfig(aux_loss="global", aux_loss_weight=0.0, z_loss_weight=0.0),
}


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("backend", ["torch", "grouped"])
def test_an_experts_layer_is_one_graph_in_training(backend, losses, tiny_model):
    """In fp32, at widths that grouped_mm takes on CPUs."""
    layer = tiny_model("E", router=LOSSES[losses], moe_ffn_hidden_size=16, num_experts=3)
    assert_one_graph(bound(layer, TORCH | {"moe_backend": backend}), documents=True, share=0.5)


def test_gated_experts_are_one_graph_in_training(tiny_model):
    layer = bound(tiny_model("E", activation="swiglu", moe_ffn_hidden_size=16), TORCH | {"moe_backend": "grouped"})
    assert_one_graph(layer, documents=False, share=0.5)


def router_losses(layer: nn.Module) -> RouterLosses:
    router = layer.get_submodule("mixer.router")
    assert isinstance(router, Router)
    return router.losses


@pytest.mark.parametrize("losses", LOSSES)
def test_a_compiled_router_counts_every_trained_token_once_and_for_itself(losses, tiny_model):
    """It is a copy: the other, from whom it was copied, must not count what it sees."""
    model = tiny_model("E", router=LOSSES[losses], num_experts=3)
    layer = bound(model, TORCH | {"moe_backend": "grouped"})
    twin = copy.deepcopy(model).layers.get_submodule("0")
    for _ in "ab":
        results(layer, layer, context(True, share=0.5))
    wanted, router_losses(layer).tally = router_losses(layer).tally, None
    torch.compiler.reset()
    run = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        run(torch.zeros(ROWS * LENGTH, HIDDEN, device=DEVICE), context(True, share=0.5))
    results(run, twin, context(True, share=None))
    assert router_losses(twin).tally is None, "an evaluation was counted"
    results(run, twin, context(True, share=0.5))
    results(lambda x, seq: checkpoint(run, x, seq, use_reentrant=False), twin, context(True, share=0.5))
    assert router_losses(layer).tally is None
    for name, counted in vars(wanted).items():
        got = getattr(router_losses(twin).tally, name)
        torch.testing.assert_close(got, counted, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_losses_of_a_model_are_one_graph_also_where_layers_are_computed_again(tiny_model, token_rows):
    """With a block that runs at two MTP depths, and documents of which only the batch knows."""
    model = tiny_model("ME*-/E/E", router=LOSSES["losses"], num_experts=3, **SMALL)
    bind_kernels(model.to(DEVICE), KernelsSection(**TORCH), DEVICE, torch.float32, packed=True)
    model.recompute, rows = True, token_rows(2, LENGTH).to(DEVICE)
    ids = (torch.arange(LENGTH, device=DEVICE) >= 9).int().expand(2, -1)
    batch = Batch(rows, rows.roll(-1, 1), torch.ones_like(rows, dtype=torch.float32), ids)

    def losses(batch: Batch) -> Tensor:
        return summed_losses(model, batch, share=0.5)

    torch.compiler.reset()
    found = []
    for run in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        values = run(batch)
        values.sum().backward()
        found.append({"losses": values.detach()} | {name: p.grad for name, p in model.named_parameters()})
        for name, router in model.named_modules():
            if isinstance(router, Router):
                found[-1] |= {f"{name}.{key}": tensor for key, tensor in vars(router.losses.tally).items()}
                router.losses.tally = None
    assert "mtp.0.layers.0.mixer.router.loads" in found[0]
    for name, wanted in found[0].items():
        got = found[1][name]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_is_told_nothing_of_its_rows_is_one_graph(tiny_model, token_rows):
    model, rows = tiny_model("*-").to(DEVICE), token_rows(2, LENGTH).to(DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows), model(rows), rtol=1e-5, atol=5e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and DEVICE.type == "cpu", reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own, many
@pytest.mark.parametrize("symbol", "M-*E")
def test_inductor_compiles_a_layer(symbol, tiny_model):
    layer = bound(tiny_model(symbol, num_experts=3, **SMALL), TORCH | {"moe_backend": "grouped"})
    assert_one_graph(layer, documents=True, share=0.5, backend="inductor")
