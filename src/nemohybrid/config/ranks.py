"""How many ranks of each kind a world has."""

import os

from nemohybrid.config.run_config import RunConfig


def data_ranks(config: RunConfig, world_size: int) -> int:
    """Data-parallel ranks, with `auto` resolved."""
    others = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    return max(1, world_size // others) if config.parallel.data == "auto" else int(config.parallel.data)


def shard_ranks(config: RunConfig, world_size: int) -> int:
    """Data ranks over which weights, gradients and optimizer state are cut; 1: each holds everything."""
    parallel, ranks = config.parallel, data_ranks(config, world_size)
    if parallel.data_mode == "replicate":
        return 1
    if parallel.data_mode != "hybrid":
        return ranks
    if parallel.data_shard is not None:
        return parallel.data_shard
    on_a_node = os.environ.get("LOCAL_WORLD_SIZE")  # of torchrun
    return ranks if on_a_node is None else max(1, int(on_a_node) // parallel.tensor)
