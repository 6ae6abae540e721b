"""The folders that transformers wrote, and copies of them to spoil."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"


CASES = ["dense", "dense_nob", "moe", "moe_grouped", "latent_moe", "mtp"]


@pytest.fixture(scope="session", params=CASES)
def case(request) -> SimpleNamespace:
    """folder, tensors (what transformers computed), gradients (by disk name), facts (loss, split into documents)."""
    folder = FIXTURES / request.param
    return SimpleNamespace(
        folder=folder,
        tensors=load_file(folder / "expected.safetensors"),
        gradients=load_file(folder / "gradients.safetensors"),
        facts=json.loads((folder / "expected.json").read_text()),
    )


@pytest.fixture(scope="session")
def untouched_folder() -> Callable[[str], Path]:
    return FIXTURES.joinpath


@pytest.fixture
def changed_folder(tmp_path) -> Callable[..., Path]:
    """`changed_folder(case, config={...}, tensors=change)`: a copy with other settings and weights."""

    def make(case: str, config: dict | None = None, tensors: Callable[[dict], object] = lambda weights: None) -> Path:
        folder = tmp_path / case
        folder.mkdir()
        shutil.copy(FIXTURES / case / "config.json", folder)
        settings = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(settings))
        weights = load_file(FIXTURES / case / "model.safetensors")
        tensors(weights)
        save_file(weights, folder / "model.safetensors")
        return folder

    return make
