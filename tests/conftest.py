"""Tiny models for every room that tests one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from turns import turn

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.model import ModelConfig
from nemohybrid.model import HybridModel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any test imports one

os.environ["NEMOHYBRID_CACHE"] = str(Path(__file__).parent / "no_cache")  # C++ kernels that this user may have built

TINY = {
    "hidden_size": 24,
    "vocab_size": 61,
    "init_std": 0.2,
    "dtype": "float32",
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 10,  # heads x head dim is not the hidden size
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "mamba_num_groups": 2,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "ffn_hidden_size": 40,
    "num_experts": 6,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 14,
    "shared_expert_ffn_hidden_size": 18,
}


def _tiny_config(pattern: str, **changes) -> ModelConfig:
    config = ModelConfig(pattern=pattern, **(TINY | changes))
    derive_sizes(config)
    return config


def _tiny_model(pattern: str, seed: int = 0, **changes) -> HybridModel:
    """No vector at its initial 0 or 1, where a mistake might not show; router biases that matter."""
    model = HybridModel.create(_tiny_config(pattern, **changes), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    return model


def _token_rows(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def _gradients(model: HybridModel, *outputs: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter, under the same random output gradients on every call."""
    generator = torch.Generator().manual_seed(7)
    losses = [(out * torch.randn(out.shape, generator=generator)).sum() for out in outputs]
    model.zero_grad(set_to_none=True)
    torch.stack(losses).sum().backward()
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    missing = dict(model.named_parameters()).keys() - result.keys()
    assert not missing, f"no gradient reaches {sorted(missing)}"
    return result


def _assert_close_to_scale(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest entry of the wanted one."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name] - expected).abs().max().item()
        scale = expected.abs().max().item()
        assert error <= tolerance * scale, f"{name}: off by {error:.1e}, its largest entry is {scale:.1e}"


LONGEST = (
    "parallel/test_parity",
    "kernels/test_ahead_of_time",
    "train/test_resharding",
    "cli/test_torchrun",
    "parallel/test_mutations",
    "launch/test_launch_slurm",
    "model/test_compile",
    "precision/test_torch_native",
    "plan/test_memory",
    "kernels/test_ssd_triton",
    "train/test_watch",
)
"""Files that take half a minute and more, the longest first: a worker that begins one when others are done keeps them waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    place = {root / f"{name}.py": number for number, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in place), "LONGEST names a file that is gone"
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before the clock of pytest-timeout starts
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with turn(item):
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums in the same order everywhere, and nothing of OpenMP to go wrong in forked children."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., HybridModel]:
    return _tiny_model


@pytest.fixture(scope="session")
def token_rows() -> Callable[..., Tensor]:
    return _token_rows


@pytest.fixture(scope="session")
def gradients() -> Callable[..., dict[str, Tensor]]:
    return _gradients


@pytest.fixture(scope="session")
def assert_close_to_scale() -> Callable[..., None]:
    return _assert_close_to_scale
