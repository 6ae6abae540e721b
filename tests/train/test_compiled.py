"""Steps of a trainer whose layers torch.compile has compiled, one by one, equal those of one whose layers it has not."""

import pytest
import torch

from nemohybrid.model.layer import Layer
from nemohybrid.parallel.context import ParallelContext
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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, tracing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_steps_of_compiled_layers_equal_plain_ones(configure):
    """Layers that are computed again and a block that runs twice count their experts' loads as often as ever."""
    plain, compiled = (Trainer(configure(*MODEL), ParallelContext.single(), []) for _ in "ab")
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
