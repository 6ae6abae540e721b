"""Packages of others behind our operators: what they are given and what is made of their results, against our references.

The packages are fakes with the real signatures (support/fake_packages.py), which compute from what they receive.
"""

import fake_packages
import pytest
import torch

from nemohybrid_kernels import conv1d, packages, ssd
from nemohybrid_kernels.backend import decide
from nemohybrid_kernels.conv1d import package
from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch
from nemohybrid_kernels.errors import BackendError
from nemohybrid_kernels.ssd import mamba_ssm
from nemohybrid_kernels.ssd.reference import ssd_sequential

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
IDS = torch.tensor([[7, 7, 7, 2, 2, 9, 9, 9, 9, 7, 7], [0] * 10 + [1]])


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """Both packages are there, for one test."""
    packages.forget()
    fake_packages.put(monkeypatch, mamba_ssm.MODULE, mamba_chunk_scan_combined=fake_packages.mamba_chunk_scan_combined)
    fake_packages.put(monkeypatch, "causal_conv1d", causal_conv1d_fn=fake_packages.causal_conv1d_fn)
    yield
    packages.forget()


@pytest.fixture
def none_installed(monkeypatch):
    packages.forget()
    monkeypatch.setattr(packages, "find_spec", lambda _: None)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan_inputs(state: bool, documents: bool) -> dict[str, torch.Tensor]:
    (B, L), H, P, G, N = IDS.shape, 4, 6, 2, 5
    inputs = {
        "x": numbers(B, L, H, P, seed=1),
        "dt": numbers(B, L, H, seed=2).exp(),
        "A": -numbers(H, seed=3).exp(),
        "B": numbers(B, L, G, N, seed=4),
        "C": numbers(B, L, G, N, seed=5),
        "D": numbers(H, seed=6),
    }
    inputs |= {"initial_state": numbers(B, H, P, N, seed=7)} if state else {}
    return inputs | ({"document_ids": IDS} if documents else {})


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
def test_the_scan_of_mamba_ssm_is_called_as_it_wants(state, documents, assert_same, results_and_gradients):
    inputs = scan_inputs(state, documents)
    want = results_and_gradients(ssd_sequential, inputs)
    assert_same(results_and_gradients(mamba_ssm.run, inputs), want, 1e-5)


@pytest.mark.parametrize("asked, given", [(None, 256), (128, 128), (100, 128), (8, 16)])
def test_chunks_are_powers_of_two(monkeypatch, asked, given):
    seen = []

    def spy(*args, **kwargs):
        seen.append(args[5])
        return fake_packages.mamba_chunk_scan_combined(*args, **kwargs)

    fake_packages.put(monkeypatch, mamba_ssm.MODULE, mamba_chunk_scan_combined=spy)
    mamba_ssm.run(**scan_inputs(False, False), chunk_size=asked)
    assert seen == [given]


def test_rows_of_a_wide_row_are_copied_before_offsets_overflow():
    far = torch.empty_strided((1, 70_000, 8, 64), (1, 40_000, 64, 1), device="meta")
    assert mamba_ssm._within_reach("x", far).is_contiguous()
    near = torch.empty_strided((1, 70_000, 8, 64), (1, 20_000, 64, 1), device="meta")
    assert mamba_ssm._within_reach("x", near) is near


def test_what_32_bit_offsets_cannot_reach_is_refused():
    long, B = torch.empty(1, 2**20, 64, 64, device="meta"), torch.empty(1, 2**20, 1, 256, device="meta")
    with pytest.raises(BackendError, match=r"32 bits, but the states of all chunks has \d+ elements.*'triton'"):
        mamba_ssm.run(long, long[..., 0], long[0, 0, :, 0], B, B)


def conv_inputs(C: int, state: bool, documents: bool, K: int = 4) -> dict[str, torch.Tensor]:
    B, L = IDS.shape
    inputs = {"x": numbers(B, L, C, seed=1), "weight": numbers(C, K, seed=2), "bias": numbers(C, seed=3)}
    inputs |= {"initial_state": numbers(B, K - 1, C, seed=4)} if state else {}
    return inputs | ({"document_ids": IDS} if documents else {})


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from inputs"])
@pytest.mark.parametrize("C", [16, 13], ids=["eights", "padded"])
def test_the_convolution_of_causal_conv1d_is_called_as_it_wants(
    C, state, documents, assert_same, results_and_gradients
):
    inputs = conv_inputs(C, state, documents)
    want = results_and_gradients(causal_conv1d_torch, inputs)
    assert_same(results_and_gradients(package.run, inputs), want, 1e-5)


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("activation", ["silu", None])
def test_rows_shorter_than_the_filter_keep_some_of_the_inputs_before(L, activation, assert_same):
    inputs = conv_inputs(8, True, True)
    inputs |= {"x": inputs["x"][:, :L], "document_ids": inputs["document_ids"][:, :L]}
    got, want = (run(**inputs, activation=activation) for run in (package.run, causal_conv1d_torch))
    assert_same(dict(enumerate(got)), dict(enumerate(want)), 1e-6)


def test_a_row_cut_from_a_wider_one_is_copied_only_where_it_must(assert_same):
    run, inputs = package.run, conv_inputs(16, False, False)
    for width in (24, 21):
        view = torch.cat([inputs["x"], inputs["x"]], 2)[..., :width].contiguous()[..., :16]
        assert_same(dict(enumerate(run(**inputs | {"x": view}))), dict(enumerate(run(**inputs))), 0.0)


@pytest.mark.parametrize("taps, nearest", [(1, 2), (5, 4), (8, 4)])
@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_filters_that_the_package_does_not_have_are_refused_when_it_is_chosen(device, taps, nearest):
    words = f"causal-conv1d takes filters of 2 to 4 taps, not of {taps}; nearest legal: {nearest}"
    with pytest.raises(BackendError, match=words):
        decide("causal_conv1d", "causal_conv1d", conv1d.backends(torch.bfloat16, taps), device)


def test_a_call_with_a_filter_of_five_taps_is_refused():
    with pytest.raises(BackendError, match="not of 5; nearest legal: 4"):
        conv1d.causal_conv1d(**conv_inputs(8, False, False, K=5), backend="causal_conv1d")


@pytest.mark.parametrize(
    "backends, reason",
    [
        (conv1d.backends(torch.float64), "causal-conv1d takes bfloat16, float16 and float32, not float64"),
        (conv1d.backends(torch.bfloat16, 5), "not causal_conv1d: causal-conv1d takes filters of 2 to 4 taps, not of 5"),
        (ssd.backends(torch.float64), "mamba-ssm takes bfloat16, float16 and float32, not float64"),
        (ssd.backends(torch.bfloat16, P=512), "mamba-ssm takes heads of up to 256, not of 512"),
        (ssd.backends(torch.bfloat16, N=320), "mamba-ssm takes states of up to 256, not of 320"),
    ],
    ids=["type of inputs", "taps", "type of states", "head", "state"],
)
def test_auto_passes_over_what_a_package_cannot_do_and_says_so(monkeypatch, backends, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    choice = decide("operator", "auto", backends, CUDA)
    assert choice.backend == "torch"
    assert reason in choice.why


@pytest.mark.parametrize("name, backends", [("causal_conv1d", conv1d.backends), ("mamba_ssm", ssd.backends)])
def test_auto_takes_a_package_where_it_can_do_what_is_asked(monkeypatch, name, backends):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert decide("operator", "auto", backends(torch.bfloat16), CUDA).backend == name


def test_what_is_not_installed_names_the_extra(none_installed):
    for module in (mamba_ssm, package):
        for device in (CUDA, CPU):
            assert "pip install 'nemohybrid[mamba]'" in (module.obstacle(device) or "")
    missing = r"is not installed; pip install 'nemohybrid\[mamba\]'"
    with pytest.raises(BackendError, match=missing):
        mamba_ssm.run(**scan_inputs(False, False))
    with pytest.raises(BackendError, match=missing):
        package.run(**conv_inputs(8, False, False))


def test_what_is_installed_works_on_gpus_alone():
    for module in (mamba_ssm, package):
        assert module.obstacle(CUDA) is None
        assert module.obstacle(CPU) == "it needs a CUDA device"
        assert "not float64" in (module.obstacle(CUDA, torch.float64) or "")


def test_a_package_built_for_another_torch_says_so(monkeypatch):
    def broken(name: str):
        raise OSError("libc10.so: undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(packages, "import_module", broken)
    found = mamba_ssm.obstacle(CUDA)
    assert found == (
        "mamba_ssm.ops.triton.ssd_combined cannot be imported (OSError: libc10.so: undefined symbol: _ZN3c10); "
        "pip install 'nemohybrid[mamba]'"
    )
