"""What the tests of this folder share.

Every test takes a `device` and runs twice: on the GPU where there is one, which is what it is for, and on the CPU, where
much of it holds trivially, so that its code cannot rot on the machines that have none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
TINY_RUN = [
    "experiment=quickstart",
    "model.hidden_size=32",
    "model.ssm_state_size=8",
    "data.sequence_length=64",
    "data.reset_documents=true",
    "train.global_batch=4",
    "train.evaluate_every=0",
    "logging.console=quiet",
    "logging.picture=false",
    "sample.prompts=[]",
]


@pytest.fixture(params=["cpu", GPU])
def device(request) -> str:
    """What to compare with the CPU."""
    return request.param


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """No TF32: its 10 bits of mantissa would drown what is compared here. torch's own default allows it in convolutions."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    yield
    products.fp32_precision, convolutions.fp32_precision = before


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """The cache of the bundled text, filled by the first run that needs it."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def configure(prepared, tmp_path) -> Callable[..., RunConfig]:
    """`configure("cuda", "train.steps=3")`: a tiny checked run in <tmp_path>/run; what is given last counts."""

    def compose(device: str, *overrides: str) -> RunConfig:
        places = [f"data.cache={prepared}", f"run.dir={tmp_path}/run", f"run.device={device}"]
        return load_config([*TINY_RUN, *places, *overrides], world_size=1)

    return compose
