"""How many ranks of each kind a world has, and in which order a pipeline of them works."""

import math
import os

from nemohybrid.config.environment import ParallelSection
from nemohybrid.config.run_config import RunConfig


def data_ranks(config: RunConfig, world_size: int) -> int:
    """Data-parallel ranks, which have other rows of the batch, with `auto` resolved."""
    others = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    data = config.parallel.data
    return int(data) if data.isdecimal() and int(data) else max(1, world_size // others)  # a rule refuses other words


def token_ranks(config: RunConfig, world_size: int) -> int:
    """Ranks that have other tokens of the batch: data x context. They share weights as data ranks do."""
    return data_ranks(config, world_size) * config.parallel.context


def data_mode(parallel: ParallelSection) -> str:
    """What data ranks share, with `auto` resolved.

    Through a pipeline `full_shard` would gather every layer again for every microbatch.
    """
    if parallel.data_mode != "auto":
        return parallel.data_mode
    return "shard_grad" if parallel.pipeline > 1 else "full_shard"


def shard_ranks(config: RunConfig, world_size: int) -> int:
    """Data and context ranks over which weights, gradients and optimizer state are cut; 1: each holds everything."""
    parallel, ranks = config.parallel, token_ranks(config, world_size)
    if data_mode(parallel) == "replicate":
        return 1
    if data_mode(parallel) != "hybrid":
        return ranks
    if parallel.data_shard is not None:
        return parallel.data_shard
    on_a_node = os.environ.get("LOCAL_WORLD_SIZE")  # of torchrun
    return ranks if on_a_node is None else min(ranks, max(1, int(on_a_node) // parallel.tensor))


def microbatch(config: RunConfig, data_ranks: int) -> int:
    """Sequences that a rank computes at a time. Where nothing is said one in a pipeline, whose ranks else wait for each other."""
    if config.train.microbatch is not None:
        return config.train.microbatch
    return 1 if config.parallel.pipeline > 1 else max(1, config.train.global_batch // data_ranks)


def expert_tensor(parallel: ParallelSection) -> int:
    """Ranks that share the width of an expert, with `empty` resolved."""
    if parallel.expert_tensor is not None:
        return parallel.expert_tensor
    return 1 if parallel.expert > 1 else parallel.tensor


def folds(parallel: ParallelSection) -> bool:
    """Whether experts lie on the ranks in another way than everything else does."""
    return (parallel.expert, expert_tensor(parallel)) != (1, parallel.tensor)


def fewest_data_ranks(parallel: ParallelSection) -> int:
    """That make room for all experts, beside the tensor and context ranks."""
    block, others = parallel.expert * expert_tensor(parallel), parallel.tensor * parallel.context
    return math.lcm(block, others) // others


def schedule(parallel: ParallelSection, stages: int) -> str:
    """The order of a pipeline's passes, with `auto` resolved. stages: of all ranks together."""
    if parallel.schedule != "auto" and parallel.pipeline > 1:
        return parallel.schedule
    return "interleaved" if stages > parallel.pipeline > 1 else "1f1b"
