"""The backend of every operator is decided before the first step, said once, and refused at once where it cannot run."""

import re
from pathlib import Path

import fake_packages
import pytest
import torch

from nemohybrid.config.compose import load_config
from nemohybrid.config.kernels import KernelsSection
from nemohybrid.errors import ConfigError
from nemohybrid.model import HybridModel
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.context_parallel.ways import Ways
from nemohybrid.train.build import build_model
from nemohybrid.train.state import fixed_settings
from nemohybrid_kernels import activation, attention, conv1d, cross_entropy, mixer, moe, norm, packages, ssd
from nemohybrid_kernels.attention import Case, flex
from nemohybrid_kernels.conv1d import package
from nemohybrid_kernels.names import BACKENDS, WITHOUT_SOFTCAP
from nemohybrid_kernels.ssd import mamba_ssm

CPU = torch.device("cpu")
TORCH = {"mixer_backend": "separate"} | {
    f"{name}_backend": "torch" for name in ("ssd", "conv1d", "attention", "norm", "activation", "moe", "cross_entropy")
}


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What was found of packages in one test is no fact of the next."""
    packages.forget()
    yield
    packages.forget()


def bound(model, packed=True, **choices: str) -> list[str]:
    return [str(choice) for choice in bind_kernels(model, KernelsSection(**choices), CPU, torch.float32, packed)]


def backends_of(model) -> set[str]:
    return {module.backend for module in model.modules() if hasattr(module, "backend")}


def test_the_names_in_the_configuration_are_those_of_the_operators():
    fp32, possible = torch.float32, {name: {*names} for name, names in BACKENDS.items()}
    assert {*ssd.backends(fp32)} == possible["ssd"]
    assert {*conv1d.backends(fp32)} == possible["conv1d"]
    assert {*norm.backends(fp32)} == {*norm.gated_backends(fp32)} == possible["norm"]
    assert {*activation.backends(fp32)} == possible["activation"]
    assert {*moe.backends(fp32)} == possible["moe"]
    assert {*cross_entropy.backends(fp32)} == possible["cross_entropy"]
    assert {*attention.backends(Case(fp32))} == possible["attention"]
    assert {*mixer.backends(fp32)} - {"torch"} == possible["mixer"] - {"separate"}


def test_the_page_lists_the_backends_of_every_operator_in_their_order():
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    rows = re.findall(r"^\| `kernels\.(\w+)_backend` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert {name: tuple(re.findall(r"`(\w+)`", cell)) for name, cell in rows} == BACKENDS


def test_the_rule_about_caps_names_the_backends_that_have_none():
    capped, plain = (attention.backends(Case(torch.bfloat16, capped=capped)) for capped in (True, False))
    reasons = {name: (capped[name].obstacle(CPU), plain[name].obstacle(CPU)) for name in capped}
    assert {name for name, (with_cap, _) in reasons.items() if "softcap" in (with_cap or "")} == {*WITHOUT_SOFTCAP}


def test_on_a_cpu_everything_is_pytorch_and_every_operator_is_named_once(tiny_model):
    model = tiny_model("MM*-E*")
    lines = bound(model)
    assert [line.partition(":")[0] for line in lines] == [
        "attention",
        "causal_conv1d",
        "cross_entropy",
        "expert_mlp",
        "gated_rms_norm",
        "mamba2_mixer",
        "rms_norm",
        "squared_relu",
        "ssd_scan",
    ]
    assert "attention: sdpa (auto)" in lines
    assert any(line.startswith("cross_entropy: plain (auto; not triton: the interpreter") for line in lines)
    assert any(line.startswith("ssd_scan: torch (auto; not triton: the interpreter is for tests") for line in lines)
    assert any(line.startswith("mamba2_mixer: separate (auto; not triton:") for line in lines)


def test_what_is_asked_for_is_what_runs(tiny_model):
    model = tiny_model("M*-E")
    lines = bound(model, **TORCH)
    assert backends_of(model) == {"torch"}
    assert "ssd_scan: torch (asked for)" in lines
    assert "squared_relu: torch (asked for)" in lines
    assert "mamba2_mixer: separate (asked for)" in lines


@pytest.mark.parametrize("symbol", ["-", "E"])
def test_squared_relu_runs_where_its_key_says(symbol, tiny_model, token_rows, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    called = []
    monkeypatch.setattr(activation, "_triton", lambda h: called.append(h) or activation.squared_relu_torch(h))
    model = tiny_model(symbol)
    for backend, calls in {"torch": False, "triton": True}.items():
        bound(model, activation_backend=backend, moe_backend="torch")
        model(token_rows(2, 5))
        assert bool(called) == calls


def test_an_activation_with_a_gate_has_no_backends(tiny_model):
    assert not any(line.startswith("squared_relu") for line in bound(tiny_model("-E", activation="swiglu")))


def test_a_model_of_plain_pytorch_computes_the_same(tiny_model, token_rows, gradients, assert_close_to_scale):
    ids, model = token_rows(2, 13), tiny_model("M*-E")
    want = gradients(model, model(ids))
    bound(model, **TORCH)
    assert_close_to_scale(gradients(model, model(ids)), want, 1e-5)


def test_a_ring_takes_what_knows_parts_of_an_attention(tiny_config, monkeypatch):
    """Of a backend that does not, PyTorch's fused kernels take the place; without a ring nothing is said of them."""
    monkeypatch.setattr(flex, "obstacle", lambda case, device: None)
    asked = {"auto": "sdpa (auto)", "sdpa": "sdpa (asked for)", "torch": "torch (asked for)", "flex": "sdpa (auto)"}
    for way in ("ring", "heads"):
        context = ParallelContext(CPU, context=Group(2), ways=Ways(attention=way))
        with torch.device("meta"):
            model = HybridModel(tiny_config("*"), context)
        for backend, taken in asked.items():
            lines = bound(model, attention_backend=backend)
            assert (f"ring_attention: {taken}" in lines) == (way == "ring")
            assert any(line.startswith("ring_attention") for line in lines) == (way == "ring")


EXTRA = r"pip install 'nemohybrid\[mamba\]'"


@pytest.mark.parametrize(
    "choice, words",
    [
        ({"ssd_backend": "mamba_ssm"}, f"kernels.ssd_backend=mamba_ssm: .*mamba_ssm is not installed; {EXTRA}"),
        ({"conv1d_backend": "causal_conv1d"}, f"kernels.conv1d_backend=causal_conv1d: .*not installed; {EXTRA}"),
        ({"attention_backend": "flash2"}, r"flash_attn is not installed; pip install 'nemohybrid\[flash\]'"),
        ({"attention_backend": "flash3"}, "flash_attn_interface is not installed; build it"),
        ({"attention_backend": "flash4"}, "flash_attn is not installed; pip install --pre flash-attn-4"),
    ],
    ids=str,
)
def test_what_is_not_installed_is_refused_before_the_first_step(tiny_model, monkeypatch, choice, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=words):
        bind_kernels(
            tiny_model("M*", head_dim=16), KernelsSection(**choice), torch.device("cuda"), torch.bfloat16, True
        )


GPU = torch.device("cuda")


@pytest.fixture
def packages_on_an_old_gpu(monkeypatch):
    """mamba-ssm and causal-conv1d are installed, and the GPU is too old for Triton kernels of ours."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    fake_packages.put(monkeypatch, mamba_ssm.MODULE)
    fake_packages.put(monkeypatch, package.MODULE)


@pytest.mark.parametrize(
    "choice, sizes, words",
    [
        (
            {"conv1d_backend": "causal_conv1d"},
            {"conv_kernel": 5},
            "kernels.conv1d_backend=causal_conv1d: .*filters of 2 to 4 taps, not of 5; nearest legal: 4",
        ),
        (
            {"ssd_backend": "mamba_ssm"},
            {"ssm_state_size": 320},
            "kernels.ssd_backend=mamba_ssm: .*takes states of up to 256, not of 320",
        ),
    ],
    ids=["taps", "state"],
)
def test_sizes_that_a_package_cannot_do_are_refused_before_the_first_step(
    tiny_model, packages_on_an_old_gpu, choice, sizes, words
):
    with pytest.raises(ConfigError, match=words):
        bind_kernels(tiny_model("M", **sizes), KernelsSection(**choice), GPU, torch.bfloat16, True)


def test_auto_passes_over_a_package_for_the_sizes_of_the_model_and_says_why(tiny_model, packages_on_an_old_gpu):
    section = KernelsSection(mixer_backend="separate")
    for taps, chosen in {4: "causal_conv1d (auto; not triton", 5: "torch (auto; not triton"}.items():
        choices = bind_kernels(tiny_model("M", conv_kernel=taps), section, GPU, torch.bfloat16, True)
        (line,) = (str(choice) for choice in choices if choice.operator == "causal_conv1d")
        assert line.startswith(f"causal_conv1d: {chosen}")
        assert ("filters of 2 to 4 taps, not of 5" in line) == (taps == 5)


def test_the_widths_of_experts_count_when_their_backend_is_chosen(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    section = KernelsSection(moe_backend="grouped")
    with pytest.raises(ConfigError, match=r"grouped: .*grouped_mm needs widths that are multiples of 8; 36 is none"):
        bind_kernels(tiny_model("E", moe_ffn_hidden_size=36), section, GPU, torch.bfloat16, True)
    bind_kernels(tiny_model("E", moe_ffn_hidden_size=32), section, GPU, torch.bfloat16, True)


def test_all_of_a_mixer_in_one_is_refused_where_its_norm_is_too_wide(tiny_model):
    """Else its parts would run, one of them in PyTorch, and the log would say that nobody asked."""
    model = tiny_model("M", mamba_num_heads=130, mamba_head_dim=64, mamba_num_groups=1, ssm_state_size=16)
    with pytest.raises(ConfigError, match=r"mixer_backend=triton: .* norm up to 8192 channels together, not 8320"):
        bound(model, mixer_backend="triton")
    assert any("mamba2_mixer: separate (auto; not triton" in line for line in bound(model))


@pytest.mark.parametrize("backend", ["flash2", "flex", "cudnn"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(tiny_model, backend):
    with pytest.raises(ConfigError, match=f"kernels.attention_backend={backend}: .*CUDA device"):
        bind_kernels(tiny_model("*", head_dim=16), KernelsSection(attention_backend=backend), CPU, torch.bfloat16, True)


def test_a_run_is_built_with_the_backends_it_asks_for():
    asked = [f"kernels.{key}={value}" for key, value in TORCH.items()]
    config = load_config(["data=shakespeare", 'model.pattern="M*-"', "model.head_dim=16", *asked])
    model, _ = build_model(config, ParallelContext.single(CPU))
    assert backends_of(model) == {"torch"}
    assert "attention: torch (asked for)" in map(str, model.kernels)


def test_a_run_may_be_resumed_with_other_backends():
    then, now = (load_config(["data=shakespeare", f"kernels={name}"]).as_dict() for name in ("torch", "auto"))
    assert then["kernels"] != now["kernels"]
    assert fixed_settings(then) == fixed_settings(now)
