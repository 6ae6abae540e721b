"""Gradients, recomputation and bf16: what training relies on."""

import pytest
import torch

from nemohybrid.config.model import AttentionConfig
from nemohybrid.model import SequenceContext

PATTERNS = ["M", "*", "-", "E", "M*-ME"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_every_parameter_gets_a_gradient(pattern, activation, tiny_model, token_rows, gradients):
    model = tiny_model(pattern, activation=activation, linear_bias=True)
    for name, gradient in gradients(model, model(token_rows(4, 31))).items():
        assert gradient.isfinite().all(), f"{name}: {gradient}"
        assert gradient.count_nonzero() > 0, f"{name}: no gradient"
        rows = gradient.flatten(1).any(1) if gradient.ndim > 1 else gradient != 0
        assert rows.float().mean() > 0.8, f"{name}: only {rows.sum()} of {len(rows)} rows are trained"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_point_where_the_loss_grows(pattern, tiny_model, token_rows, gradients):
    """Along the gradient, the loss rises by its squared norm times the step: a finite difference of the whole model."""
    model, ids = tiny_model(pattern), token_rows(2, 15)
    projection = torch.randn(2, 15, 61, generator=torch.Generator().manual_seed(7))
    grads = gradients(model, model(ids))
    squared_norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum()
    step = 1e-3 / squared_norm.sqrt()

    def loss_after(move: float) -> torch.Tensor:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(grads[name], alpha=move)
            result = (model(ids).double() * projection).sum()
            for name, parameter in model.named_parameters():
                parameter.sub_(grads[name], alpha=move)
        return result

    slope = (loss_after(step.item()) - loss_after(-step.item())) / (2 * step)
    assert abs(slope / squared_norm - 1) < 0.01, (
        f"{pattern}: slope {slope:.4f}, squared gradient norm {squared_norm:.4f}"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit(dtype, tiny_model, token_rows, gradients):
    model = tiny_model("M*-E", dtype=dtype, attention=AttentionConfig(position_embedding="rope"))
    ids, split = token_rows(2, 12), [[5, 7], [12]]
    plain = model(ids, SequenceContext.packed(split))
    kept = gradients(model, plain)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    again = model(ids, SequenceContext.packed(split))
    assert torch.equal(plain, again)
    recomputed = gradients(model, again)
    assert len(calls) == 2, "layers must run again in the backward pass"
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_bf16_computes_in_bf16_and_keeps_parameters_and_gradients_in_fp32(tiny_model, token_rows, gradients):
    """Within 5% of the largest logit, 15% of each gradient's norm: bf16 has 8 bits, and the model is 5 layers deep."""
    every_expert = {"moe_top_k": 6}  # or a rounded score may send a token to another one
    exact, rounded = (tiny_model("M*-ME", dtype=dtype, **every_expert) for dtype in ("float32", "bfloat16"))
    ids = token_rows(2, 24)
    want, got = exact(ids), rounded(ids)
    assert (want.dtype, got.dtype) == (torch.float32, torch.bfloat16)
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    wanted = gradients(exact, want)
    for name, gradient in gradients(rounded, got).items():
        assert rounded.get_parameter(name).dtype == gradient.dtype == torch.float32, name
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.15, f"{name}: relative error {error:.3f}"


def test_a_model_built_on_meta_computes_nothing_until_it_is_given_memory(tiny_config):
    from nemohybrid.model import HybridModel

    with torch.device("meta"):
        model = HybridModel(tiny_config("M*-E"))
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.materialize("cpu", seed=1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu", name
        assert tensor.isfinite().all(), name
