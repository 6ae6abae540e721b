"""The kernels that a model takes by itself on this device pass the kernel canary, at sizes of published models."""

import pytest
import torch

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import ModelConfig
from nemohybrid.model import HybridModel
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.train.canary_cases import Calls, cases_of
from nemohybrid_kernels.canary import check

SIZES = {
    "hidden_size": 1024,
    "vocab_size": 4096,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "ssm_state_size": 128,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "head_dim": 128,
    "num_experts": 16,
    "moe_ffn_hidden_size": 512,
}


@pytest.mark.parametrize("mixer", ["auto", "separate"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_kernels_of_this_machine_are_right(device, dtype, packed, mixer):
    config = ModelConfig(pattern="M*E", **SIZES)
    derive_sizes(config)
    with torch.device("meta"):
        model = HybridModel(config)
    where = torch.device(device)
    bind_kernels(model, KernelsSection(mixer_backend=mixer), where, dtype, packed)
    cases = cases_of(model, Calls.of(dtype, where, packed, None))
    assert bool(cases) == (where.type == "cuda"), [case.name for case in cases]
    for case in cases:
        check(case, where)
