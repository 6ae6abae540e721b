"""Attention: the twin against float64 by hand, every backend against the twin, values and all gradients."""

from functools import partial

import fake_packages
import pytest
import torch
from torch.nn.attention import SDPBackend

from nemohybrid_kernels import packages
from nemohybrid_kernels.attention import Case, Documents, attention, backends, flash, flex, sdpa
from nemohybrid_kernels.attention.reference import attention_torch
from nemohybrid_kernels.backend import decide
from nemohybrid_kernels.errors import BackendError, ShapeError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
IDS = torch.tensor([[7, 7, 7, 2, 2, 9, 9, 9, 9, 7, 7], [0] * 10 + [1]])
VARLEN = {
    "flash2": (flash.FLASH2, fake_packages.flash2_varlen),
    "flash3": (flash.FLASH3, fake_packages.flash3_varlen),
    "flash4": (flash.FLASH4, fake_packages.flash4_varlen),
}
DOCUMENTS = pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "documents"])


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What was found of packages in one test is no fact of the next."""
    packages.forget()
    yield
    packages.forget()


@pytest.fixture(params=VARLEN)
def installed(request, monkeypatch):
    """One of the flash-attn packages, alone, on a Hopper GPU."""
    one, function = VARLEN[request.param]
    fake_packages.put(monkeypatch, one.module, flash_attn_varlen_func=function)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return one


def qkv(dtype: torch.dtype, rows: int = 2, length: int = 11, P: int = 8) -> dict[str, torch.Tensor]:
    """Four heads over two, cut from one wide row as a layer cuts them."""
    wide = torch.randn(rows, length, (4 + 2 + 2) * P, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads = (part.unflatten(-1, (-1, P)).transpose(1, 2) for part in wide.split([4 * P, 2 * P, 2 * P], -1))
    return dict(zip("qkv", heads, strict=True))


def by_hand(q, k, v, ids, softcap):
    """Token by token, in a loop over everything."""
    out = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        start = t
        while start > 0 and (ids is None or ids[b, start - 1] == ids[b, t]):
            start -= 1
        keys, values = (x[b, h // 2, start : t + 1] for x in (k, v))
        scores = keys @ q[b, h, t] / q.shape[-1] ** 0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        out[b, h, t] = scores.softmax(0) @ values
    return out


def alone(run, **options):
    """As `results_and_gradients` wants it."""
    return lambda **inputs: (run(**inputs, **options),)


@DOCUMENTS
@pytest.mark.parametrize("backend, softcap", [("torch", None), ("torch", 0.5), ("sdpa", None)])
def test_what_runs_anywhere_equals_a_loop_by_hand(backend, softcap, ids, assert_same):
    inputs, documents = qkv(torch.float64), None if ids is None else Documents(ids)
    got = attention(**inputs, documents=documents, softcap=softcap, backend=backend)
    assert_same({"out": got}, {"out": by_hand(**inputs, ids=ids, softcap=softcap)}, 1e-12)


@DOCUMENTS
def test_sdpa_equals_the_twin_with_all_gradients(ids, assert_same, results_and_gradients):
    inputs, documents = qkv(torch.float32), None if ids is None else Documents(ids)
    want = results_and_gradients(alone(attention_torch, documents=documents, scale=0.3), inputs)
    got = results_and_gradients(alone(attention, documents=documents, scale=0.3, backend="sdpa"), inputs)
    assert_same(got, want, 1e-5)


@DOCUMENTS
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_flash_attn_is_called_as_it_wants(installed, softcap, ids, assert_same, results_and_gradients):
    if softcap is not None and not installed.caps:
        assert "softcap" in (flash.obstacle(installed, Case(torch.bfloat16, capped=True), CUDA) or "")
        return
    inputs, documents = qkv(torch.bfloat16), None if ids is None else Documents(ids)
    options = {"documents": documents, "softcap": softcap}
    want = results_and_gradients(alone(attention_torch, **options), inputs)
    assert_same(results_and_gradients(alone(partial(flash.run, installed), **options), inputs), want, 0.02)


def test_flash_attn_is_deterministic_where_torch_shall_be(monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs["deterministic"])
        return fake_packages.flash2_varlen(*args, **kwargs)

    fake_packages.put(monkeypatch, "flash_attn", flash_attn_varlen_func=spy)
    for wanted in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda wanted=wanted: wanted)
        flash.run(flash.FLASH2, **qkv(torch.bfloat16))
    assert seen == [False, True]


def test_flash_attn_is_chosen_for_documents_where_it_is_installed(installed):
    choice = decide("attention", "auto", backends(Case(torch.bfloat16, 64, packed=True)), CUDA)
    assert VARLEN[choice.backend][0] is installed
    assert choice.why.startswith("auto; not sdpa: documents would be a mask of all pairs of tokens")
    assert decide("attention", "auto", backends(Case(torch.bfloat16, 64)), CUDA).backend == "sdpa"


def test_without_packages_documents_and_caps_are_flexattentions(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for case in (Case(torch.bfloat16, packed=True), Case(torch.float32, capped=True)):
        assert decide("attention", "auto", backends(case), CUDA).backend == "flex"
    narrow = Case(torch.float32, head_dim=10, packed=True)
    assert decide("attention", "auto", backends(narrow), CUDA).backend == "sdpa"
    for name, words in {
        "flash2": r"pip install 'nemohybrid\[flash\]'",
        "flash4": "pip install --pre flash-attn-4",
    }.items():
        with pytest.raises(BackendError, match=f"flash_attn is not installed; {words}"):
            decide("attention", name, backends(Case(torch.bfloat16)), CUDA)


@pytest.mark.parametrize(
    "case, words",
    [
        (Case(torch.float32), "takes bfloat16 and float16, not float32"),
        (Case(torch.bfloat16, head_dim=60), "in eights, not of 60"),
        (Case(torch.bfloat16, head_dim=512), "in eights, not of 512"),
    ],
    ids=str,
)
def test_flash_attn_refuses_what_it_has_no_kernels_for(installed, case, words):
    assert words in (flash.obstacle(installed, case, CUDA) or "")


def test_flash_attn_3_is_for_hopper(monkeypatch):
    fake_packages.put(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=fake_packages.flash3_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert flash.obstacle(flash.FLASH3, Case(torch.bfloat16), CUDA) == (
        "flash-attn 3 has no kernels for compute capability 8.0"
    )


@pytest.mark.parametrize("length", [1, 300])
def test_flexattention_visits_the_blocks_that_torch_would_find(length):
    from torch.nn.attention.flex_attention import create_block_mask

    ids = (torch.rand(3, length, generator=torch.Generator().manual_seed(3)) < 0.02).cumsum(1)
    blocks = Documents(ids).blocks
    want = create_block_mask(blocks.mask_mod, 3, None, length, length, device="cpu")
    assert torch.equal(blocks.to_dense(), want.to_dense())
    assert torch.equal(blocks.full_kv_num_blocks, want.full_kv_num_blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 0.5])
@DOCUMENTS
def test_flexattention_equals_the_twin(ids, softcap, assert_same):
    """Forward only: torch has no backward pass of it on CPUs."""
    documents = None if ids is None else Documents(ids.repeat_interleave(20, 1))
    inputs = qkv(torch.float32, length=220)
    got, want = (run(**inputs, documents=documents, softcap=softcap) for run in (flex.run, attention_torch))
    assert_same({"out": got}, {"out": want}, 1e-5)


def test_cudnn_comes_first_and_nothing_is_left_out():
    assert sdpa.PREFERRED[0] == SDPBackend.CUDNN_ATTENTION
    left_out = {*SDPBackend.__members__.values()} - {*sdpa.PREFERRED}
    assert {backend.name for backend in left_out} <= {"ERROR", "OVERRIDEABLE"}


def test_a_mask_goes_to_who_takes_one(assert_same):
    """While generating, whatever trained: more keys than queries."""
    inputs = qkv(torch.float32)
    inputs["q"] = inputs["q"][:, :, -3:]
    mask = torch.ones(3, 11, dtype=torch.bool).tril_(8)[None, None]
    want = attention_torch(**inputs, mask=mask)
    for backend in ("auto", "flex", "flash3", "torch"):
        assert_same({"out": attention(**inputs, mask=mask, backend=backend)}, {"out": want}, 1e-6)
    capped = attention(**inputs, mask=mask, softcap=0.5, backend="flex")
    assert_same({"out": capped}, {"out": attention_torch(**inputs, mask=mask, softcap=0.5)}, 1e-6)


def test_shapes_that_do_not_fit_are_refused():
    inputs = qkv(torch.float32)
    with pytest.raises(ShapeError, match="4 query heads cannot be divided"):
        attention(inputs["q"], *(inputs[name][:, [0, 1, 1]] for name in "kv"))
    with pytest.raises(ShapeError, match="k has shape"):
        attention(inputs["q"][:, :, -3:], inputs["k"], inputs["v"])
    with pytest.raises(ShapeError, match="document ids"):
        attention(**inputs, documents=Documents(IDS[:, :5]))
    with pytest.raises(BackendError, match="no backend 'fast'"):
        attention(**inputs, mask=torch.ones(1, 1, 11, 11, dtype=torch.bool), backend="fast")
