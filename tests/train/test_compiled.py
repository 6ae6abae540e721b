"""Steps of a trainer whose layers torch.compile has compiled, one by one, equal those of one whose layers it has not."""

import pytest
import torch

from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.layer import Layer
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.world import divide
from nemohybrid.plan.axes import axes
from nemohybrid.train.trainer import Trainer

MODEL = [
    'model.pattern="ME*-E/E/E"',  # one MTP block, run twice
    "model.num_experts=4",
    "model.moe_top_k=2",
    "model.router.bias_update_rate=0.01",
    "model.router.aux_loss_weight=0.5",
    "data.reset_documents=true",
    "train.microbatch=2",
    "train.recompute=layer",
]


IGNORED = (
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]  # torch's own, tracing


def assert_compiled_steps_equal_plain_ones(config: RunConfig, context: ParallelContext) -> None:
    plain, compiled = (Trainer(config, context, []) for _ in "ab")
    torch.compiler.reset()
    for layer in compiled.model.modules():
        if isinstance(layer, Layer):
            layer.compile(fullgraph=True, backend="aot_eager")
    for step in range(2):
        wanted, got = plain.train_step(), compiled.train_step()
        assert got.loss == pytest.approx(wanted.loss, rel=1e-5), step
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4), step
        assert got.metrics["moe_aux_loss"] == pytest.approx(wanted.metrics["moe_aux_loss"], rel=1e-5), step
        assert torch.equal(compiled.balance.loads, plain.balance.loads), step
        assert plain.balance.loads.sum() > 0


def test_steps_of_compiled_layers_equal_plain_ones(configure):
    """Layers that are computed again and a block that runs twice count their experts' loads as often as ever."""
    assert_compiled_steps_equal_plain_ones(configure(*MODEL), ParallelContext.single())


@pytest.mark.parametrize(
    "parallel",
    [
        ["parallel.tensor=2", "parallel.sequence=true"],
        pytest.param(["parallel.context=2", "parallel.context_method=ring+states"], marks=pytest.mark.slow),
        pytest.param(["parallel.context=2", "parallel.context_method=all_to_all"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_compiled_layers_share_tensors_and_tokens_as_plain_ones(parallel, configure, run_ranks):
    config = configure(*MODEL, "model.pattern='ME*-'", *parallel, world_size=2)

    def steps(_: ParallelContext) -> None:
        assert_compiled_steps_equal_plain_ones(config, divide(torch.device("cpu"), axes(config, 2)))

    assert run_ranks(steps) == ["", ""]
