"""scripts/bench/kernels/counts.py says what kernels move and multiply; the page of predicted times says what it says."""

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from interpreted_work import watched

from nemohybrid_kernels import launching
from nemohybrid_kernels.activation import triton as relu2
from nemohybrid_kernels.calls import (
    BF16,
    FP32,
    Experts,
    Mixer,
    run_conv,
    run_experts,
    run_loss,
    run_mixer,
    run_norm,
    run_scan,
)
from nemohybrid_kernels.cross_entropy import triton as cross_entropy
from nemohybrid_kernels.launching import recording

BENCH = Path(__file__).parents[2] / "scripts/bench/kernels"
TINY = Mixer(tokens=40, heads=4, width=16, state=16, groups=2, dtype=FP32)


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        names = ("cases", "counts", "counts_mamba", "predicted")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def filled(shape, dtype, like):
    """A `Maker`: what is counted does not depend on the entries, but places and labels must exist."""
    if like in ("order", "labels"):
        return torch.arange(shape[0])
    if like == "starts":
        return (
            torch.arange(shape[1], dtype=torch.int32).div(20, rounding_mode="floor").mul(20).expand(shape).contiguous()
        )
    return torch.full(shape, -0.5 if like == "rates" else 0.5, dtype=dtype)


def padded_loss(make):
    """24 columns of logits, and 8 of padding."""
    logits, labels, out = make((6, 32), FP32, "normal"), make((6,), torch.int64, "labels"), make((3, 6), FP32, "normal")
    cross_entropy.statistics_of_rows(logits, labels, 24, out)
    cross_entropy.gradient_of_rows(logits, labels, 24, out[:2], make((6,), FP32, "normal"))
    return [logits]


def squared_relu(make):
    """Without weights."""
    x, dy = (make((10, 48), FP32, "normal") for _ in range(2))
    return [relu2.forward(x), relu2.backward(dy, x)]


CASES = {
    "mixer": partial(run_mixer, TINY),
    "convolution with history": partial(run_conv, replace(TINY, packed=True)),
    "scan with an initial state, in bf16": partial(run_scan, replace(TINY, groups=1, packed=True, dtype=BF16)),
    "norm": partial(run_norm, 48, FP32, 10),
    "experts": partial(run_experts, Experts(8, 32, 48, 2, FP32)),
    "squared ReLU": squared_relu,
    "loss": partial(run_loss, 8, 32, FP32),
    "loss with padding": padded_loss,
}


@pytest.mark.skipif(not launching.interpreted(), reason="only the interpreter tells what a kernel reads")
@pytest.mark.parametrize("name", CASES)
def test_a_launch_moves_and_multiplies_what_is_counted(scripts, name):
    with recording(90) as launches:  # which run below, in their order
        CASES[name](filled)
    assert launches
    for launch in launches:
        counted = scripts.counts.of_launch(launch)
        with watched() as work:
            launching.launch(launch.kernel, launch.grid, launch.config, **launch.arguments)
        assert (counted.bytes, counted.flops) == (work.bytes, work.flops), counted.name


def test_the_convolution_at_the_main_sizes_by_hand(scripts):
    """x and y of 8192 tokens and 8192 + 2 * 8 * 128 channels, four taps and a bias for each channel, all in bf16."""
    kernel = next(k for k in scripts.predicted.ours(scripts.cases.MAIN).forward if k.name == "conv1d_forward")
    assert (kernel.bytes, kernel.flops) == (2 * (2 * 8192 * 10240 + 4 * 10240 + 10240), 0)


def test_the_states_at_the_main_sizes_by_hand(scripts):
    """64 chunks of 128 tokens: x and B in bf16, dt and the factor of each step; a state for each chunk and head."""
    kernel = next(k for k in scripts.predicted.ours(scripts.cases.MAIN).forward if k.name == "ssd_states")
    read = 2 * 8192 * (128 * 64 + 8 * 128) + 4 * (2 * 128 * 8192 + 128 * 64)
    written = 2 * 64 * 128 * 128 * 64 + 4 * (
        128 * 128 * 64 + 128
    )  # the last state, and the decay over the row, in fp32
    assert (kernel.bytes, kernel.flops) == (read + written, 2 * 64 * 128 * 128 * 128 * 64)


def test_gradients_of_a_group_in_mamba_ssm_by_hand(scripts):
    """2048 tokens in 8 chunks of 16 heads: one head for each processor, so dB comes in 16 parts."""
    sizes = replace(scripts.cases.MAIN, tokens=2048, heads=16, groups=1)
    kernels = {kernel.name: kernel for kernel in scripts.counts_mamba.mamba_ssm(sizes, 256).backward}
    parts = 16 * 4 * 2048 * 128
    own = 2 * 2048 * 16 * 64 + 2 * 8 * 16 * 64 * 128 + 2 * 2048 * 128  # x, states, B
    assert kernels["chunk_state_bwd_db"].bytes == own + parts + 3 * 4 * 2048 * 16
    assert kernels["sum of dB"].bytes == parts + 4 * 2048 * 128
    assert kernels["chunk_state_bwd_db"].flops == 2 * 2048 * 16 * 64 * 128


def test_the_page_of_predicted_times_is_up_to_date(scripts):
    page = scripts.predicted
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "scripts/bench/kernels/predicted.py writes it anew"


def test_an_old_page_of_predicted_times_is_noticed(scripts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scripts.predicted, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(scripts.predicted.page() + "one more line\n", encoding="utf-8")
    assert scripts.predicted.main(["--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert scripts.predicted.main([]) == scripts.predicted.main(["--check"]) == 0
