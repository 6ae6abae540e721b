"""What compiles or chooses kernels of its own for attention, against the twin: values and all gradients."""

import pytest
import torch

from nemohybrid_kernels.attention import Case, Documents, attention, backends
from nemohybrid_kernels.attention.reference import attention_torch

LENGTH, WIDTH = 300, 64  # neither a multiple of a block nor shorter than one


def qkv(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Eight heads over two, as a layer cuts them from one wide row."""
    wide = torch.randn(2, LENGTH, 12 * WIDTH, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    parts = wide.split([8 * WIDTH, 2 * WIDTH, 2 * WIDTH], -1)
    return [part.unflatten(-1, (-1, WIDTH)).transpose(1, 2).requires_grad_() for part in parts]


def results(run, inputs, **options) -> list[torch.Tensor]:
    out = run(*inputs, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flex", "flash2", "flash3", "flash4"])
def test_every_backend_that_can_run_equals_the_twin(device, backend, packed, softcap, dtype, tolerance):
    documents = None
    if packed:
        borders = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.02
        documents = Documents(borders.cumsum(1).to(device))
    case = Case(dtype, WIDTH, packed=packed, capped=softcap is not None)
    if backends(case)[backend].obstacle(torch.device(device)) is not None:
        backend = "auto"
    inputs, options = qkv(device, dtype), {"documents": documents, "softcap": softcap}
    want = results(attention_torch, inputs, **options)
    got = results(attention, inputs, **options, backend=backend)
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error <= tolerance, f"{backend}: {name} is off by {error:.1e} of its scale"


def test_documents_of_every_batch_use_one_compilation(device):
    """New documents are new tensors, not new code; what compiles again and again is given up on, silently."""
    for seed in range(12):
        borders = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.02
        documents = Documents(borders.cumsum(1).to(device))
        inputs = [part.detach() for part in qkv(device, torch.float32)]
        got = attention(*inputs, documents=documents)
        want = attention_torch(*inputs, documents=documents)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
