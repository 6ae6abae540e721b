"""What the canary compares is what a run trains with: the same kernels in the same form, though of fewer tokens."""

import pytest
import torch

from nemohybrid.config.derive import derive_sizes
from nemohybrid.config.kernels import KernelsSection
from nemohybrid.config.model import ModelConfig
from nemohybrid.model import HybridModel
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.train.canary_cases import Calls, cases_of
from nemohybrid_kernels import canary
from nemohybrid_kernels.launching import Recording, recording

pytest.importorskip("triton")
from nemohybrid_kernels.ssd.triton import Call, backward, forward

CPU, BF16 = torch.device("cpu"), torch.bfloat16
WIDTH, STATE = 64, 128


def scan_case(mixer: str, heads: int, groups: int, calls: Calls) -> canary.Case:
    sizes = {"mamba_num_heads": heads, "mamba_num_groups": groups, "mamba_head_dim": WIDTH, "ssm_state_size": STATE}
    config = ModelConfig(pattern="M", hidden_size=64, vocab_size=64, **sizes)
    derive_sizes(config)
    with torch.device("meta"):
        model = HybridModel(config)
    ours = {f"{part}_backend": "triton" for part in ("ssd", "conv1d", "norm")}
    bind_kernels(model, KernelsSection(mixer_backend=mixer, **ours), CPU, BF16, packed=False)
    operator = "ssd_scan" if mixer == "separate" else "mamba2_mixer"
    (case,) = (case for case in cases_of(model, calls) if case.operator == operator)
    return case


def forms(launches: Recording) -> set[str]:
    """Of the kernels of the scan: their constant arguments, and whether states go on from others."""
    return {
        f"{launch.kernel.__name__} {dict(launch.config.tiles)} reverse={launch.arguments.get('REVERSE')} "
        f"initial={launch.arguments.get('initial') is not None}"
        for launch in launches
        if launch.kernel.__name__.startswith("ssd_")
    }


def trained(heads: int, groups: int, rows: int, row: int, final: bool) -> Recording:
    """`final`: with a gradient of the last state, which the operator of the scan gets from autograd, be it zero."""

    def empty(*shape, dtype=BF16):
        return torch.empty(rows, row, *shape, dtype=dtype, device="meta")

    of_heads = torch.empty(heads, device="meta")
    x, B = empty(heads, WIDTH), empty(groups, STATE)
    call = Call(x, empty(heads, dtype=torch.float32), of_heads, B, B, of_heads)
    with recording(90) as launches:
        y, state, _ = forward(call)
        backward(call, y, state if final else None)
    return launches


@pytest.mark.parametrize("mixer", ["separate", "triton"])
@pytest.mark.parametrize("heads, groups", [(128, 8), (16, 1)], ids=["whole layer", "tensor-parallel shard"])
@pytest.mark.parametrize("rows, row", [(1, 8192), (1, 512), (4, 2048)])
def test_the_scan_is_compared_in_the_form_that_is_trained(mixer, heads, groups, rows, row):
    """How many heads a program has, and whether rows are cut into segments, depends on the number of tokens."""
    case = scan_case(mixer, heads, groups, Calls.of(BF16, CPU, False, None, row, rows))
    with recording(90) as launches:  # nothing runs: what comes back is what memory held
        canary._results_of_kernel(case, case.inputs())
    assert forms(launches) == forms(trained(heads, groups, rows, row, final=mixer == "separate"))
