"""What compiles or chooses kernels of its own for attention, against the twin: values and all gradients."""

import pytest
import torch

from nemohybrid_kernels.attention import Case, Documents, attention, backends
from nemohybrid_kernels.attention.parts import Keys, gradients_of_part, join, kernels, part_of_attention
from nemohybrid_kernels.attention.parts import keys as keys_of_parts
from nemohybrid_kernels.attention.parts import sdpa as sdpa_parts
from nemohybrid_kernels.attention.parts.halves import attention_in_halves
from nemohybrid_kernels.attention.reference import attention_torch

LENGTH, WIDTH = 300, 64  # neither a multiple of a block nor shorter than one
TYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"]
)


def of_parts(test):
    """In both types, with heads that kernels have and with heads that are filled up for them."""
    return TYPES(pytest.mark.parametrize("width", [64, 60])(test))


def qkv(device: str, dtype: torch.dtype, width: int = WIDTH) -> list[torch.Tensor]:
    """Eight heads over two, as a layer cuts them from one wide row."""
    wide = torch.randn(2, LENGTH, 12 * width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    parts = wide.split([8 * width, 2 * width, 2 * width], -1)
    return [part.unflatten(-1, (-1, width)).transpose(1, 2).requires_grad_() for part in parts]


def results(run, inputs, **options) -> list[torch.Tensor]:
    out = run(*inputs, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@TYPES
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
    assert_close(("out", "dq", "dk", "dv"), got, want, tolerance, backend)


def assert_close(names, got, want, tolerance: float, of: str) -> None:
    for name, mine, theirs in zip(names, got, want, strict=True):
        error = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error <= tolerance, f"{of}: {name} is off by {error:.1e} of its scale"


@of_parts
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_what_is_joined_of_fused_parts_equals_the_twin(device, packed, width, dtype, tolerance):
    """As on two ranks of a ring: own keys and those of the other, gradients by the sums over both."""
    ids = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.02).cumsum(1).to(device)
    inputs = qkv(device, dtype, width)
    want = results(attention_torch, inputs, documents=Documents(ids) if packed else None)
    got = results(attention_in_halves, inputs, segments=ids if packed else None, backend="sdpa")
    assert_close(("out", "dq", "dk", "dv"), got, want, tolerance, "sdpa")


@of_parts
@pytest.mark.parametrize("kernel", ["any", "efficient"])
def test_a_fused_part_equals_the_twin(device, kernel, width, dtype, tolerance, monkeypatch):
    """More queries than keys, some of which see none; with a mask for 70 queries at a time. Both kernels of a GPU."""
    if kernel == "efficient" and device != "cpu":
        monkeypatch.setattr(sdpa_parts, "kernel_for", lambda *_: kernels.EFFICIENT)
    monkeypatch.setattr(keys_of_parts, "SCORES_AT_ONCE", 70 * 2 * 130)
    q, k, v = (part.detach() for part in qkv(device, dtype, width))
    of_queries = (torch.arange(LENGTH, device=device) // 40).repeat(2, 1)
    of_keys = torch.tensor([[2], [3]], device=device) + torch.arange(130, device=device) // 50
    for documents in ((None, None), (of_queries, of_keys)):
        keys = Keys(k[:, :, 20:150], v[:, :, 20:150], *documents, scale=width**-0.5)
        own, sums = part_of_attention(q, keys, "torch")
        out, sums = join(torch.zeros_like(own), torch.zeros_like(sums), (own, sums))  # beside one key of the value 0
        whole = out.to(dtype), sums, q.flip(2)
        got, want = (
            (*part_of_attention(q, keys, backend), *gradients_of_part(q, keys, *whole, backend))
            for backend in ("sdpa", "torch")
        )
        blind = want[1] == -torch.inf
        assert blind.any() == (documents[0] is not None)
        assert torch.equal(got[1] == -torch.inf, blind)
        got, want = ((x[0], x[1].masked_fill(blind, 0), *x[2:]) for x in (got, want))
        assert_close(("out", "sums", "dq", "dk", "dv"), got, want, tolerance, kernel)


def test_documents_of_every_batch_use_one_compilation(device):
    """New documents are new tensors, not new code; what compiles again and again is given up on, silently."""
    for seed in range(12):
        borders = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.02
        documents = Documents(borders.cumsum(1).to(device))
        inputs = [part.detach() for part in qkv(device, torch.float32)]
        got = attention(*inputs, documents=documents)
        want = attention_torch(*inputs, documents=documents)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
