"""An M layer through one operator equals the same layer, operator by operator."""

import pytest
import torch

from nemohybrid.model.sequence import SequenceContext

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compare natively")
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_loss_and_gradients_are_those_of_the_separate_operators(tiny_model, documents):
    model = tiny_model("M")
    ids = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(0))
    seq = SequenceContext(1, 20, (torch.arange(20)[None] > 8).int() if documents else None)
    mixer = getattr(model.layers, "0").mixer
    results = {}
    for backend in ("separate", "triton"):
        mixer.mixer_backend = backend
        assert mixer.is_fused(torch.ones(1)) == (backend == "triton")
        logits = model(ids, seq)
        model.zero_grad()
        logits.square().mean().backward()
        results[backend] = {"logits": logits, **{name: p.grad for name, p in model.named_parameters()}}
    for name, wanted in results["separate"].items():
        torch.testing.assert_close(
            results["triton"][name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("changes", [{"mamba_bc_norm": True}, {"mamba_x_norm": True}])
def test_norms_within_the_mixer_keep_it_separate(tiny_model, changes):
    mixer = getattr(tiny_model("M", **changes).layers, "0").mixer
    mixer.mixer_backend = "triton"
    assert not mixer.is_fused(torch.ones(1))
