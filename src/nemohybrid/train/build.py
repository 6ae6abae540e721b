"""From a configuration and a place among the ranks to a model with memory and first values."""

import torch

from nemohybrid.config.precision import policy_of
from nemohybrid.config.ranks import data_mode, schedule
from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.hybrid import DTYPES, HybridModel
from nemohybrid.model.kernels import bind_kernels
from nemohybrid.model.precision import clock_of, sites
from nemohybrid.model.stage import of_rank
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.data import DataRanks, Replicated, Sharded
from nemohybrid.plan.cut import staged
from nemohybrid.precision.binding import Binding


def build_model(config: RunConfig, context: ParallelContext) -> tuple[HybridModel, DataRanks]:
    """This rank's part of the model, and how the data ranks share it. No rank ever holds more than it will train."""
    stages = of_rank(staged(config), context.pipeline.rank)
    if context.shard.size == 1:
        model = HybridModel.create(config.model, config.run.seed, context, stages)
        shared: DataRanks = Replicated(model, context)
    else:
        with torch.device("meta"):
            model = HybridModel(config.model, context, stages)
        shared = Sharded(
            model,
            context,
            [list(model.sharding_units(stage)) for stage in stages],
            entry="hidden_states",
            keep_weights=data_mode(config.parallel) == "shard_grad",
            dtype=DTYPES[config.model.dtype],
            reduce_every_microbatch=config.parallel.reduce_every_microbatch,
        )
        model.materialize(context.device, config.run.seed)
    model.clock = clock_of(context, config.run.seed)
    stays = data_mode(config.parallel) == "shard_grad"
    keeps = context.shard.size == 1 or (stays and context.tensor.size == 1)  # ranks that share a matrix act in step
    policy, backend = policy_of(config.precision), config.precision.backend
    model.precision = Binding(sites(model, keeps), policy, backend, context.device)
    packed, dtype = config.data.reset_documents, DTYPES[config.model.dtype]
    model.kernels = bind_kernels(model, config.kernels, context.device, dtype, packed)
    model.recompute = config.train.recompute == "layer"
    model.schedule = schedule(config.parallel, stages[0].count)
    return model, shared
