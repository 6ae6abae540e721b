"""From a configuration to the axes along which a world of ranks is divided."""

from nemohybrid.config.context import attention_way, mamba_way
from nemohybrid.config.ranks import expert_tensor, shard_ranks
from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.context import Axes
from nemohybrid.parallel.context_parallel.ways import Ways


def axes(config: RunConfig, world_size: int) -> Axes:
    """Those of `config` in a world of so many ranks."""
    parallel = config.parallel
    return Axes(
        tensor=parallel.tensor,
        shard=shard_ranks(config, world_size),
        sequence=parallel.sequence,
        pipeline=parallel.pipeline,
        expert=parallel.expert,
        expert_tensor=expert_tensor(parallel),
        dispatcher=parallel.dispatcher,
        room=parallel.expert_room,
        context=parallel.context,
        ways=Ways(attention_way(config), mamba_way(config)),
    )
