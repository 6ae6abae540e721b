"""Every published Nemotron: its configuration says what the papers and NVIDIA's recipes say, to the last parameter."""

# h hidden, f MLP, q and kv heads, H x P Mamba heads, N state; E experts, K of a token, widths fe, fs (shared), l (latent)
from types import SimpleNamespace

import pytest

from nemohybrid.config.accounting import TRAINING_PASSES, costs_by_part, total_cost
from nemohybrid.config.compose import load_model_config
from nemohybrid.config.groups import groups
from nemohybrid.symbols import parse_pattern

VOCABULARY, GROUPS, HEAD_DIM, TAPS = 131072, 8, 128, 4
NANO = {"h": 2688, "q": 32, "kv": 2, "H": 64, "P": 64, "N": 128, "E": 128, "K": 6, "fe": 1856, "fs": 3712, "l": 0}
SIZES = {  # model -> sizes, and layers M / * / - or E (arXiv 2504.03624, 2508.14444, 2512.20848, 2604.12374, Megatron-Bridge)
    "nemotron_h_4b": ({"h": 3072, "f": 12288, "q": 32, "kv": 8, "H": 112, "P": 64, "N": 128}, (24, 4, 24)),
    "nemotron_h_8b": ({"h": 4096, "f": 21504, "q": 32, "kv": 8, "H": 128, "P": 64, "N": 128}, (24, 4, 24)),
    "nemotron_h_47b": ({"h": 8192, "f": 30720, "q": 64, "kv": 8, "H": 256, "P": 64, "N": 256}, (45, 5, 48)),
    "nemotron_h_56b": ({"h": 8192, "f": 32768, "q": 64, "kv": 8, "H": 256, "P": 64, "N": 256}, (54, 10, 54)),
    "nemotron_nano_v2_12b": ({"h": 5120, "f": 20480, "q": 40, "kv": 8, "H": 128, "P": 80, "N": 128}, (28, 6, 28)),
    "nemotron_nano_v2_9b": ({"h": 4480, "f": 15680, "q": 40, "kv": 8, "H": 128, "P": 80, "N": 128}, (27, 4, 25)),
    "nemotron3_nano_4b": ({"h": 3136, "f": 12544, "q": 40, "kv": 8, "H": 96, "P": 80, "N": 128}, (21, 4, 17)),
    "nemotron3_nano_30b": (NANO, (23, 6, 23)),
    "nemotron3_5_lightning": ({**NANO, "mtp": "*E"}, (23, 6, 23)),
    "nemotron3_super": (
        {"h": 4096, "q": 32, "kv": 2, "H": 128, "P": 64, "N": 128, "E": 512, "K": 22}
        | {"fe": 2688, "fs": 5376, "l": 1024, "mtp": "*E"},
        (40, 8, 40),
    ),
    "nemotron3_ultra": (
        {"h": 8192, "q": 64, "kv": 2, "H": 256, "P": 64, "N": 128, "E": 512, "K": 22}
        | {"fe": 5120, "fs": 10240, "l": 2048, "mtp": "*E"},
        (48, 12, 48),
    ),
}
STATED = {  # billions of parameters with MTP, and active ones without, as far as they are published or add up
    "nemotron_h_8b": (8.101, 8.101),
    "nemotron_h_56b": (56.32, 56.32),
    "nemotron3_nano_30b": (31.578, 3.580),
    "nemotron3_super": (123.611, 12.770),
    "nemotron3_ultra": (560.525, 56.06),
}
MEGATRON_GFLOPS = {  # of one token at sequence length 8192, by Megatron-LM's own formula
    "nemotron_h_8b": 46.71,
    "nemotron_h_47b": 280.25,
    "nemotron_h_56b": 340.24,
    "nemotron_nano_v2_12b": 72.10,
    "nemotron_nano_v2_9b": 48.66,
    "nemotron3_nano_4b": 21.06,
    "nemotron3_nano_30b": 22.28,
    "nemotron3_5_lightning": 28.15,
    "nemotron3_super": 84.73,
    "nemotron3_ultra": 358.9,
}


def mamba(s: SimpleNamespace) -> int:
    inner, shared = s.H * s.P, GROUPS * s.N
    in_proj, conv = s.h * (2 * inner + 2 * shared + s.H), (inner + 2 * shared) * (TAPS + 1)
    return in_proj + conv + 3 * s.H + inner + inner * s.h + s.h


def attention(s: SimpleNamespace) -> int:
    return s.h * (s.q + 2 * s.kv) * HEAD_DIM + s.q * HEAD_DIM * s.h + s.h


def mlp(s: SimpleNamespace) -> int:
    return 2 * s.h * s.f + s.h


def moe(s: SimpleNamespace, experts: int) -> int:
    return s.h * s.E + 2 * s.h * s.fs + 2 * s.h * s.l + s.h + experts * 2 * (s.l or s.h) * s.fe


def parameters(s: SimpleNamespace, layers: tuple[int, int, int], experts: int = 0) -> int:
    """All parameters when `experts` counts all of them, the active ones when it counts those of a token; no MTP."""
    third = moe(s, experts) if hasattr(s, "E") else mlp(s)
    return layers[0] * mamba(s) + layers[1] * attention(s) + layers[2] * third + s.h + 2 * VOCABULARY * s.h


def mtp_block(s: SimpleNamespace) -> int:
    return 2 * s.h**2 + 3 * s.h + attention(s) + moe(s, s.E)


@pytest.mark.parametrize("name", SIZES)
def test_a_published_model_is_counted_to_the_last_parameter(name):
    sizes, layers = SIZES[name]
    s = SimpleNamespace(**sizes)
    config = load_model_config([f"model={name}"]).model
    counts, parts = parse_pattern(config.pattern).counts, costs_by_part(config, 8192)
    assert (counts["M"], counts["*"], counts.get("-", 0) + counts.get("E", 0)) == layers
    mtp = parts.pop("mtp", None)
    assert sum(c.parameters for c in parts.values()) == parameters(s, layers, sizes.get("E", 0))
    assert sum(c.active for c in parts.values()) == parameters(s, layers, sizes.get("K", 0))
    assert (mtp.parameters if mtp else 0) == (mtp_block(s) if "mtp" in sizes else 0)


@pytest.mark.parametrize("name", STATED)
def test_totals_are_those_that_are_published(name):
    total, active = STATED[name]
    parts = costs_by_part(load_model_config([f"model={name}"]).model, 8192)
    assert sum(c.parameters for c in parts.values()) / 1e9 == pytest.approx(total, rel=2e-4)
    assert sum(c.active for part, c in parts.items() if part != "mtp") / 1e9 == pytest.approx(active, rel=2e-4)


@pytest.mark.parametrize("name", MEGATRON_GFLOPS)
def test_the_megatron_column_is_what_megatron_reports(name):
    """Nano 3 30B and Lightning follow exactly from published TFLOP/s and tokens/s; the others from the same formula."""
    cost = total_cost(load_model_config([f"model={name}"]).model, 8192)
    assert TRAINING_PASSES * cost.flops_megatron / 1e9 == pytest.approx(MEGATRON_GFLOPS[name], rel=2e-4)


def test_no_published_model_is_missing_from_these_tests():
    assert {name for name in groups()["model"] if name.startswith("nemotron")} == set(SIZES)
