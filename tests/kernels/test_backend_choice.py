import pytest
import torch

from nemohybrid_kernels.backend import Backend, choose, decide, lines_of
from nemohybrid_kernels.conv1d import causal_conv1d
from nemohybrid_kernels.errors import BackendError, ShapeError
from nemohybrid_kernels.moe import expert_mlp
from nemohybrid_kernels.norm import gated_rms_norm
from nemohybrid_kernels.ssd import ssd_scan

CPU = torch.device("cpu")
BACKENDS = {
    "fast": Backend(lambda: "fast", lambda device: "needs a CUDA device" if device.type == "cpu" else None),
    "torch": Backend(lambda: "torch"),
}


def test_auto_takes_the_first_backend_that_can_run():
    assert choose("op", "auto", BACKENDS, CPU)() == "torch"
    assert choose("op", "auto", BACKENDS, torch.device("cuda"))() == "fast"


def test_a_named_backend_that_cannot_run_is_refused_with_its_reason():
    with pytest.raises(BackendError, match=r"'fast' cannot run on cpu: needs a CUDA device.*backend='auto'"):
        choose("op", "fast", BACKENDS, CPU)


@pytest.mark.parametrize("operator", ["ssd_scan", "causal_conv1d", "expert_mlp"])
def test_every_operator_names_its_legal_backends(operator):
    x, w = torch.ones(1, 2, 4), torch.ones(4, 3)
    calls = {
        "ssd_scan": lambda: ssd_scan(
            x[..., None], x, -torch.ones(4), x[:, :, None], x[:, :, None], backend="cuda-magic"
        ),
        "causal_conv1d": lambda: causal_conv1d(x, w, backend="cuda-magic"),
        "expert_mlp": lambda: expert_mlp(
            x[0],
            torch.zeros(2, 1, dtype=torch.long),
            torch.ones(2, 1),
            w.T[None],
            w[None],
            activation=torch.relu,
            backend="cuda-magic",
        ),
    }
    with pytest.raises(BackendError, match=rf"{operator} has no backend 'cuda-magic'. Legal: 'auto', .*'torch'"):
        calls[operator]()


def test_wrong_shapes_are_named_with_the_legal_value():
    x, B = torch.ones(1, 2, 6, 4), torch.ones(1, 2, 4, 5)
    with pytest.raises(ShapeError, match=r"6 heads cannot be divided by groups=4. Nearest legal: 3"):
        ssd_scan(x, x[..., 0], -torch.ones(6), B, B)
    with pytest.raises(ShapeError, match=r"dt has shape \[1, 2\], expected \[B=1, L=2, H=6\]"):
        ssd_scan(x, x[..., 0, 0], -torch.ones(6), B[:, :, :3], B[:, :, :3])
    with pytest.raises(ShapeError, match=r"initial_state has shape \[1, 3, 4\], expected \[B=1, taps=2, C=4\]"):
        causal_conv1d(x[:, :, 0], torch.ones(4, 3), initial_state=torch.ones(1, 3, 4))
    with pytest.raises(ShapeError, match=r"6 channels cannot be divided by group_size=5. Nearest legal: 6"):
        gated_rms_norm(torch.ones(6), torch.ones(6), torch.ones(6), group_size=5, eps=1e-5)
    with pytest.raises(ValueError, match=r"no activation 'gelu'. Legal: 'silu', None"):
        causal_conv1d(x[:, :, 0], torch.ones(4, 3), activation="gelu")


def test_operators_with_the_same_answer_share_a_line():
    possible = {"fast": Backend(len, lambda device: "it needs a GPU; pip install fast"), "plain": Backend(len)}
    choices = [decide(name, "auto", possible, CPU) for name in ("scan", "norm")] + [
        decide("loss", "plain", possible, CPU)
    ]
    assert lines_of(choices) == [
        "scan, norm: plain (auto; not fast: it needs a GPU)",
        "loss: plain (asked for)",
    ], "advice is for who asks for a backend"
