"""Parts of an attention: fused kernels against the twin, and what is joined of parts against attention at once."""

import fake_fused_attention
import pytest
import torch

from nemohybrid_kernels.attention import Case, Documents
from nemohybrid_kernels.attention.parts import Keys, backends, gradients_of_part, join, kernels, part_of_attention, sdpa
from nemohybrid_kernels.attention.parts import keys as keys_of_parts
from nemohybrid_kernels.attention.parts.halves import attention_in_halves
from nemohybrid_kernels.attention.reference import attention_torch
from nemohybrid_kernels.backend import decide
from nemohybrid_kernels.errors import BackendError

CPU = torch.device("cpu")
KINDS = {
    "causal": (14, True, False),
    "whole": (9, False, False),
    "causal documents": (14, True, True),
    "documents": (9, False, True),
}
"""Keys for 14 queries, whether they are those of the same tokens, and whether there are documents."""
KIND = pytest.mark.parametrize("kind", KINDS)
HEAD_DIM = pytest.mark.parametrize("P", [8, 5])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part_of(kind: str, P: int, dtype: torch.dtype, heads: int = 2) -> tuple[torch.Tensor, Keys]:
    """Four heads over two, cut from wider tensors as a ring cuts them. Among documents are queries that see no key."""
    length, causal, packed = KINDS[kind]
    q, (k, v) = numbers(2, 4, 20, P).to(dtype)[:, :, 6:], numbers(2, 2, heads, 20, P, seed=1).to(dtype)[..., :length, :]
    queries, keys = torch.arange(14).repeat(2, 1) // 4, torch.arange(length).repeat(2, 1) // 4
    keys[0] += 0 if causal else 3
    queries[0] += 0 if causal else 2
    of = (queries, keys) if packed else (None, None)
    return q, Keys(k, v, *of, causal, P**-0.5)


def whole_of(q: torch.Tensor, keys: Keys) -> list[torch.Tensor]:
    """A result, the log of a sum and a gradient, of an attention over these and other keys and for more queries."""
    out, sums = part_of_attention(q, keys, "torch")
    more = numbers(*q.shape, seed=2).to(out.dtype), numbers(*q.shape[:3], seed=3).to(out.dtype)
    out, sums = join(*more, (out, sums))
    wider = (torch.cat([x, x], 2) for x in (out.to(q.dtype), sums, numbers(*q.shape, seed=4).to(q.dtype)))
    return [x[:, :, q.shape[2] :] for x in wider]


def compare(q: torch.Tensor, keys: Keys, tolerance: float, assert_same) -> None:
    """`sdpa` with the twin: both results, and the gradients."""
    names, whole = ("out", "sums", "dq", "dk", "dv"), whole_of(q, keys)
    got, want = (
        (*part_of_attention(q, keys, backend), *gradients_of_part(q, keys, *whole, backend))
        for backend in ("sdpa", "torch")
    )
    blind = want[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, blind)
    assert not got[0][blind].any()
    found, wanted = (dict(zip(names, results, strict=True)) for results in (got, want))
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in wanted.items()}
    for results in (found, wanted):
        results["sums"] = results["sums"].masked_fill(blind, 0)
    assert_same(found, wanted, tolerance)


@KIND
@HEAD_DIM
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_fused_parts_are_those_of_the_twin(kind, P, dtype, tolerance, assert_same, monkeypatch):
    """With a mask for five queries at a time."""
    q, keys = part_of(kind, P, dtype)
    monkeypatch.setattr(keys_of_parts, "SCORES_AT_ONCE", 5 * 2 * keys.k.shape[2])
    compare(q, keys, tolerance, assert_same)


@HEAD_DIM
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "kernel, kind",
    [*((kernels.FLASH, kind) for kind in ("causal", "whole")), *((kernels.EFFICIENT, kind) for kind in KINDS)],
)
def test_kernels_of_gpus_are_called_as_they_want(kernel, heads, kind, P, assert_same, monkeypatch):
    """By stand-ins with their schemas. In bf16, and fp32 where that is taken."""
    monkeypatch.setattr(keys_of_parts, "SCORES_AT_ONCE", 80)
    types = {torch.bfloat16: 0.02} | ({torch.float32: 1e-5} if kernel is kernels.EFFICIENT else {})
    monkeypatch.setattr(sdpa, "kernel_for", lambda *_: kernel)
    with fake_fused_attention.put():
        for dtype, tolerance in types.items():
            compare(*part_of(kind, P, dtype, heads), tolerance, assert_same)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_is_joined_of_parts_is_the_attention(backend, softcap, packed, assert_same, results_and_gradients):
    """With the gradients of all: those of a part are by the sums over all keys, not its own."""
    inputs = dict(zip("qkv", (numbers(2, heads, 12, 5, seed=heads) for heads in (4, 2, 2)), strict=True))
    ids = torch.tensor([[0] * 3 + [1] * 5 + [2] * 4, [0] * 6 + [1] * 6]) if packed else None
    documents = None if ids is None else Documents(ids)
    got, want = (
        results_and_gradients(lambda run=run, more=more, **given: (run(**given, softcap=softcap, **more),), inputs)
        for run, more in (
            (attention_in_halves, {"segments": ids, "backend": backend}),
            (attention_torch, {"documents": documents}),
        )
    )
    assert_same(got, want, 1e-12)


@pytest.mark.parametrize(
    "device, case, words",
    [
        ("cpu", Case(torch.float32, capped=True), "knows no softcap"),
        ("meta", Case(torch.float32), "CPUs and CUDA devices alone"),
        ("cuda", Case(torch.float64), "bfloat16, float16 and float32, not float64"),
    ],
)
def test_what_fused_kernels_cannot_is_plain_pytorchs(device, case, words):
    possible, device = backends(case), torch.device(device)
    assert decide("ring_attention", "auto", possible, device).backend == "torch"
    with pytest.raises(BackendError, match=words):
        decide("ring_attention", "sdpa", possible, device)


def test_a_torch_with_other_operators_is_not_asked(monkeypatch):
    for device in ("cpu", "cuda"):
        assert sdpa.obstacle(Case(torch.float32), torch.device(device)) is None
    changed = kernels.Kernel("changed", *[lambda: None] * 2, {"_scaled_dot_product_flash_attention": (8, 9)})
    assert "is not that of torch" in (changed.obstacle or "")
    gone = kernels.Kernel("gone", *[lambda: None] * 2, {"_no_such_attention": (7, 9)})
    monkeypatch.setattr(sdpa, "kernel_for", lambda *_: gone)
    assert decide("ring_attention", "auto", backends(Case(torch.float32)), CPU).backend == "torch"


@pytest.mark.parametrize(
    "dtype, head_dim, masked, built, capability, kernel",
    [
        (torch.bfloat16, 128, False, True, (9, 0), kernels.FLASH),
        (torch.float16, 100, False, True, (8, 0), kernels.FLASH),
        (torch.float16, 128, False, True, (7, 0), kernels.EFFICIENT),
        (torch.bfloat16, 128, False, False, (9, 0), kernels.EFFICIENT),
        (torch.bfloat16, 128, True, True, (9, 0), kernels.EFFICIENT),
        (torch.bfloat16, 264, False, True, (9, 0), kernels.EFFICIENT),
        (torch.float32, 128, False, True, (9, 0), kernels.EFFICIENT),
    ],
)
def test_flash_attention_is_taken_where_it_can(dtype, head_dim, masked, built, capability, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert kernels.kernel_for(torch.device("cuda"), dtype, head_dim, masked) is kernel
