"""The optional C++ kernels, wherever there is a compiler, against oracles in float64 and against their twins."""

import shutil
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemohybrid_kernels import cpp
from nemohybrid_kernels.activation import squared_relu_torch
from nemohybrid_kernels.activation.cpp import squared_relu_cpp
from nemohybrid_kernels.attention import Documents, sdpa
from nemohybrid_kernels.attention import cpp as attention_cpp
from nemohybrid_kernels.attention.reference import attention_torch
from nemohybrid_kernels.conv1d.cpp import causal_conv1d_cpp
from nemohybrid_kernels.conv1d.reference import causal_conv1d_torch
from nemohybrid_kernels.cpp import build
from nemohybrid_kernels.mixer.cpp import mamba2_mixer_cpp
from nemohybrid_kernels.mixer.reference import mamba2_mixer_torch
from nemohybrid_kernels.norm.cpp import gated_rms_norm_cpp, rms_norm_cpp
from nemohybrid_kernels.norm.reference import gated_rms_norm, rms_norm
from nemohybrid_kernels.ssd.cpp import ssd_scan_cpp
from nemohybrid_kernels.ssd.reference import ssd_chunked, ssd_sequential

DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])


@pytest.fixture(autouse=True, scope="module")
def library(request):
    """Built in about five seconds, once for each version of the sources, where no other test finds it."""
    if shutil.which("g++") is None or build.openmp_file() is None:
        pytest.skip("no C++ compiler, or no OpenMP to share with torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOHYBRID_CACHE", str(request.config.cache.mkdir("cpp_kernels")))
        forget_the_library()
        build.build()
        yield
    forget_the_library()


def forget_the_library():
    for function in (build.library_file, cpp._missing, cpp._library):
        function.cache_clear()


def numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def ids(batch, L, seed=0):
    """Repeats, disorder, single tokens."""
    return torch.randint(0, 3, (batch, L), generator=torch.Generator().manual_seed(seed))


def scan_inputs(batch=2, L=45, H=4, P=8, G=2, N=6, dtype=torch.float32, documents=False, state=True):
    normal = numbers(L)
    inputs = {
        "x": normal(batch, L, H, P).to(dtype),
        "dt": torch.nn.functional.softplus(normal(batch, L, H) - 1).float(),
        "A": (-torch.exp(normal(H))).float(),
        "B": normal(batch, L, G, N).to(dtype),
        "C": normal(batch, L, G, N).to(dtype),
        "D": normal(H).float(),
    }
    if documents:
        inputs["document_ids"] = ids(batch, L)
    if state:
        inputs["initial_state"] = normal(batch, H, P, N).float()
    return inputs


def conv_inputs(B=2, L=45, C=17, K=4, dtype=torch.float32, documents=False, state=True, bias=True):
    normal = numbers(L)
    inputs = {"x": normal(B, L, C).to(dtype), "weight": normal(C, K).float()}
    if bias:
        inputs["bias"] = normal(C).float()
    if documents:
        inputs["document_ids"] = ids(B, L)
    if state:
        inputs["initial_state"] = normal(B, K - 1, C).to(dtype)
    return inputs


def norm_inputs(rows=70, D=24, dtype=torch.float32, gate=True):
    normal = numbers(rows)
    inputs = {"x": normal(rows, D).to(dtype), "z": normal(rows, D).to(dtype), "weight": normal(D).float()}
    return inputs if gate else {k: v for k, v in inputs.items() if k != "z"}


MIXER = {"heads": 3, "groups": 1, "state": 8, "group_size": 12, "eps": 1e-5, "chunk_size": 16}


def mixer_inputs(dtype=torch.float32, documents=False, bare=False):
    normal = numbers(3)
    inputs = {
        "zxbcdt": normal(2, 37, 24 + 40 + 3).to(dtype),
        "conv_weight": normal(40, 4).float(),
        "conv_bias": normal(40).float(),
        "dt_bias": normal(3).float(),
        "A": -normal(3).exp().float(),
        "D": normal(3).float(),
        "norm_weight": normal(24).float(),
    }
    if documents:
        inputs["document_ids"] = ids(2, 37)
    return inputs | ({"conv_bias": None, "D": None} if bare else {})


def only_result(run, **options):
    return lambda **inputs: (run(**inputs, **options),)


def in_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@DTYPES
@DOCUMENTS
@pytest.mark.parametrize("G", [1, 2, 4])
def test_scan_equals_the_sequential_oracle(dtype, tolerance, documents, G, assert_same, results_and_gradients):
    inputs = scan_inputs(G=G, dtype=dtype, documents=documents)
    want = results_and_gradients(ssd_sequential, in_double(inputs))
    got = results_and_gradients(lambda **i: ssd_scan_cpp(**i, chunk_size=16), inputs)
    assert got["out0"].dtype == dtype
    assert got["out1"].dtype == torch.float32
    assert_same(got, want, tolerance)


@DOCUMENTS
@pytest.mark.parametrize(
    "batch, L, H, P, G, N, Q", [(1, 1, 1, 1, 1, 1, 8), (3, 17, 3, 5, 3, 2, 4), (1, 33, 6, 20, 2, 33, 32)]
)
def test_scan_of_odd_sizes_without_skip_and_state(
    batch, L, H, P, G, N, Q, documents, assert_same, results_and_gradients
):
    inputs = scan_inputs(batch, L, H, P, G, N, documents=documents, state=False)
    del inputs["D"]
    got = results_and_gradients(lambda **i: ssd_scan_cpp(**i, chunk_size=Q), inputs)
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


def test_scan_with_strong_decays_keeps_its_digits(assert_same, results_and_gradients):
    inputs = scan_inputs(L=64, documents=True)
    inputs["dt"] *= 300.0
    got = results_and_gradients(lambda **i: ssd_scan_cpp(**i, chunk_size=16), inputs)
    assert_same(got, results_and_gradients(ssd_sequential, in_double(inputs)), 1e-5)


def test_scan_at_the_sizes_of_a_real_row(assert_same, results_and_gradients):
    inputs = scan_inputs(batch=1, L=150, H=2, P=64, G=1, N=32, documents=True)
    inputs["dt"] *= 0.1
    want = results_and_gradients(ssd_sequential, in_double(inputs))
    assert_same(results_and_gradients(ssd_scan_cpp, inputs), want, 1e-5)


@DTYPES
@DOCUMENTS
@pytest.mark.parametrize("K", [1, 3, 4, 5])
def test_convolution_equals_its_twin_in_double(dtype, tolerance, documents, K, assert_same, results_and_gradients):
    inputs = conv_inputs(K=K, dtype=dtype, documents=documents)
    if K == 1:
        del inputs["initial_state"]
    want = results_and_gradients(causal_conv1d_torch, in_double(inputs))
    assert_same(results_and_gradients(causal_conv1d_cpp, inputs), want, tolerance)


@DOCUMENTS
@pytest.mark.parametrize("L", [1, 2, 3, 32, 35, 64])
@pytest.mark.parametrize("state", [False, True], ids=["no past", "past"])
def test_convolution_of_any_length(L, documents, state, assert_same, results_and_gradients):
    inputs = conv_inputs(L=L, documents=documents, state=state, bias=False)
    for activation in ("silu", None):
        got = results_and_gradients(partial(causal_conv1d_cpp, activation=activation), inputs)
        want = results_and_gradients(partial(causal_conv1d_torch, activation=activation), in_double(inputs))
        assert_same(got, want, 1e-5)


def test_not_even_infinity_leaks_into_the_next_document():
    x = torch.ones(1, 6, 8)
    x[:, 2] = float("inf")
    y, _ = causal_conv1d_cpp(x, torch.ones(8, 4), document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert y[:, 3:].isfinite().all()


@DTYPES
@pytest.mark.parametrize("D, group", [(24, 24), (24, 8), (17, 1)])
def test_norms_equal_their_twins_in_double(dtype, tolerance, D, group, assert_same, results_and_gradients):
    for run, twin, gate in ((gated_rms_norm_cpp, gated_rms_norm, True), (rms_norm_cpp, rms_norm, False)):
        options = {"eps": 1e-5, **({"group_size": group} if gate else {})}
        inputs = norm_inputs(D=D, dtype=dtype, gate=gate)
        got = results_and_gradients(only_result(run, **options), inputs)
        want = results_and_gradients(only_result(twin, **options), in_double(inputs))
        assert_same(got, want, tolerance)


def test_parts_of_wider_rows_need_no_copy(assert_same, results_and_gradients):
    """As a Mamba-2 layer cuts its projection up."""

    def run(conv, scan, norm, wide, weight, dt):
        z, xbc, _ = wide.split([12, 20, 3], dim=-1)
        x, B, C = (part.unflatten(-1, (-1, 4)) for part in conv(xbc, weight)[0].split([12, 4, 4], dim=-1))
        y, _ = scan(x, dt, -torch.ones(3).to(dt), B, C)
        return (norm(y.flatten(2), z, torch.ones(12).to(wide), group_size=6, eps=1e-5),)

    normal = numbers(0)
    inputs = {"wide": normal(2, 40, 35).float(), "weight": normal(20, 4).float(), "dt": torch.rand(2, 40, 3)}
    got = results_and_gradients(lambda **i: run(causal_conv1d_cpp, ssd_scan_cpp, gated_rms_norm_cpp, **i), inputs)
    want = results_and_gradients(
        lambda **i: run(causal_conv1d_torch, ssd_chunked, gated_rms_norm, **i), in_double(inputs)
    )
    assert_same(got, want, 1e-5)


@DTYPES
@DOCUMENTS
@pytest.mark.parametrize("limit", [None, (0.05, 0.6)], ids=["no limit", "limit"])
def test_mixer_equals_its_twin_in_double(dtype, tolerance, documents, limit, assert_same, results_and_gradients):
    inputs, options = mixer_inputs(dtype, documents), MIXER | {"dt_limit": limit}
    got = results_and_gradients(only_result(mamba2_mixer_cpp, **options), inputs)
    want = results_and_gradients(only_result(mamba2_mixer_torch, **options), in_double(inputs))
    assert_same(got, want, tolerance)


@DTYPES
@DOCUMENTS
@pytest.mark.parametrize("L", [1, 19, 40])
def test_attention_equals_its_twin_in_double(dtype, tolerance, documents, L, assert_same, results_and_gradients):
    normal = numbers(L)
    inputs = {
        "q": normal(2, 6, L, 12).to(dtype),
        "k": normal(2, 2, L, 12).to(dtype),
        "v": normal(2, 2, L, 12).to(dtype),
    }
    options = {"documents": Documents(ids(2, L)) if documents else None}
    got = results_and_gradients(only_result(attention_cpp.run, **options), inputs)
    want = results_and_gradients(only_result(attention_torch, **options), in_double(inputs))
    assert_same(got, want, tolerance)


def test_attention_rounds_less_than_pytorchs_kernel(results_and_gradients):
    """A product of bf16 matrices is rounded to bf16; large scores would lose the digits behind the point."""
    normal = numbers(1)
    inputs = {"q": 4 * normal(2, 2, 64, 16), "k": 4 * normal(2, 2, 64, 16), "v": normal(2, 2, 64, 16)}
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    want = results_and_gradients(only_result(attention_torch), in_double(inputs))
    errors = [
        sum((results_and_gradients(only_result(run), inputs)[name].double() - want[name]).norm() for name in want)
        for run in (attention_cpp.run, sdpa.run)
    ]
    assert errors[0] < 1.2 * errors[1]


@DTYPES
def test_squared_relu_equals_its_twin_in_double(dtype, tolerance, assert_same, results_and_gradients):
    inputs = {"h": numbers(0)(3, 5001).to(dtype)}
    want = results_and_gradients(only_result(squared_relu_torch), in_double(inputs))
    assert_same(results_and_gradients(only_result(squared_relu_cpp), inputs), want, tolerance)


def qkv(dtype=torch.float32):
    normal = numbers(2)
    return {
        "q": normal(2, 6, 19, 12).to(dtype),
        "k": normal(2, 2, 19, 12).to(dtype),
        "v": normal(2, 2, 19, 12).to(dtype),
    }


def in_documents(document_ids, **inputs):
    return attention_cpp.run(**inputs, documents=Documents(document_ids))


def norm_of_parts(wide, weight):
    """What is normed and its gate are columns of wider rows."""
    return gated_rms_norm_cpp(wide[..., 3:15], wide.flip(0)[..., 9:21], weight, group_size=6, eps=1e-5)


TRACED = {
    "scan": (ssd_scan_cpp, scan_inputs(documents=True)),
    "scan without skip and state": (ssd_scan_cpp, scan_inputs(state=False) | {"D": None}),
    "convolution": (causal_conv1d_cpp, conv_inputs(documents=True)),
    "convolution without bias and state": (causal_conv1d_cpp, conv_inputs(bias=False, state=False)),
    "norm": (only_result(partial(rms_norm_cpp, eps=1e-5)), norm_inputs(gate=False)),
    "norm of a part": (only_result(norm_of_parts), {"wide": numbers(5)(2, 9, 24).float(), "weight": torch.ones(12)}),
    "mixer": (only_result(mamba2_mixer_cpp, **MIXER, dt_limit=(0.05, 0.6)), mixer_inputs(documents=True)),
    "mixer without bias and skip": (only_result(mamba2_mixer_cpp, **MIXER), mixer_inputs(bare=True)),
    "mixer in bf16": (only_result(mamba2_mixer_cpp, **MIXER), mixer_inputs(torch.bfloat16)),
    "attention": (only_result(in_documents), qkv() | {"document_ids": ids(2, 19)}),
    "attention in bf16": (only_result(attention_cpp.run), qkv(torch.bfloat16)),
    "squared relu": (only_result(squared_relu_cpp), {"h": numbers(0)(40, 3).float().T}),
}


def traced(name):
    """What to run, and the tensors to give it."""
    run, given = TRACED[name]
    inputs = {key: tensor for key, tensor in given.items() if tensor is not None}
    return partial(run, **dict.fromkeys(given.keys() - inputs.keys())), inputs


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", TRACED)
def test_torch_compile_takes_each_as_a_step_of_one_graph(name, results_and_gradients):
    """Forward and backward, and with the very results."""
    run, inputs = traced(name)
    torch.compiler.reset()
    want = results_and_gradients(run, inputs)
    got = results_and_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    different = [key for key, tensor in want.items() if not torch.equal(got[key], tensor)]
    assert not different


@pytest.mark.parametrize("name", TRACED)
def test_a_layer_that_is_computed_again_has_the_same_gradients(name, results_and_gradients):
    """A checkpoint gives out what was saved once, and only once."""
    run, inputs = traced(name)
    plain = results_and_gradients(run, inputs)
    again = results_and_gradients(lambda **i: checkpoint(run, use_reentrant=False, **i), inputs)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


def test_results_depend_neither_on_the_run_nor_on_the_threads(results_and_gradients):
    cases = [
        (lambda **i: ssd_scan_cpp(**i, chunk_size=16), scan_inputs(documents=True)),
        (causal_conv1d_cpp, conv_inputs(L=100, documents=True)),
        (lambda **i: (gated_rms_norm_cpp(**i, group_size=8, eps=1e-5),), norm_inputs(rows=200)),
    ]
    for run, inputs in cases:
        first = results_and_gradients(run, inputs)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                again = results_and_gradients(run, inputs)
                assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("x", [-200.0, -87.5, -50.0, -1.0, 0.0, 3.0, 88.0, 200.0, float("inf"), float("nan")])
def test_the_exponential_has_no_bad_places(x):
    values = torch.full((1, 16, 1), x)
    got, _ = causal_conv1d_cpp(values, torch.ones(1, 1))
    torch.testing.assert_close(got, torch.nn.functional.silu(values), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_obstacles_say_what_to_do(monkeypatch, tmp_path):
    assert "CPUs" in (cpp.obstacle(torch.device("cuda"), torch.float32) or "")
    assert "float64" in (cpp.obstacle(torch.device("cpu"), torch.float64) or "")
    assert cpp.obstacle(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(cpp, "library_file", lambda: tmp_path / "missing.so")
    cpp._missing.cache_clear()
    assert build.COMMAND in (cpp.obstacle(torch.device("cpu"), torch.float32) or "")
    cpp._missing.cache_clear()


def test_a_library_that_others_could_have_written_is_not_run(monkeypatch, tmp_path):
    library = tmp_path / "kernels.so"
    library.touch(mode=0o666)
    library.chmod(0o666)
    monkeypatch.setattr(cpp, "library_file", lambda: library)
    cpp._missing.cache_clear()
    assert "others may write" in (cpp.obstacle(torch.device("cpu"), torch.float32) or "")
    cpp._missing.cache_clear()


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="install g\\+\\+"):
        build.build()


def test_a_failed_build_leaves_nothing_and_shows_the_message(monkeypatch, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return missing; }")
    monkeypatch.setattr(build, "library_file", lambda: tmp_path / "cache" / "kernels.so")
    monkeypatch.setattr(build, "_sources", lambda headers=False: [broken])
    with pytest.raises(build.BuildError, match="missing"):
        build.build()
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["kernels.lock"]
