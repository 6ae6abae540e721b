"""From a configuration and a place among the ranks to a model with memory and first values."""

import torch

from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.data import DataRanks, Replicated, Sharded
from nemohybrid.precision.gemm import bind


def build_model(config: RunConfig, context: ParallelContext) -> tuple[HybridModel, DataRanks]:
    """This rank's part of the model, and how the data ranks share it. No rank ever holds more than it will train."""
    if context.shard.size == 1:
        model = HybridModel.create(config.model, config.run.seed, context)
        shared: DataRanks = Replicated(model, context)
    else:
        with torch.device("meta"):
            model = HybridModel(config.model, context)
        shared = Sharded(
            model,
            context,
            model.sharding_units(),
            entry="hidden_states",
            keep_weights=config.parallel.data_mode == "shard_grad",
            dtype=DTYPES[config.model.dtype],
            reduce_every_microbatch=config.parallel.reduce_every_microbatch,
        )
        model.materialize(context.device, config.run.seed)
    bind(model.modules(), config.precision.recipe)
    model.recompute = config.train.recompute == "layer"
    return model, shared
