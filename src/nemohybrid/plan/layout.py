"""What a layout comes to before it runs: memory of its fullest rank, what a rank sends, how long the ranks of a pipeline wait."""

from dataclasses import dataclass

from nemohybrid.config.ranks import data_mode, data_ranks, microbatch, shard_ranks
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import ConfigError
from nemohybrid.plan.communication import Row, counts, step_traffic
from nemohybrid.plan.memory import MemoryEstimate, estimate
from nemohybrid.plan.pipeline import PipelinePlan, plan_pipeline


@dataclass(frozen=True)
class LayoutPlan:
    """A step of one configuration. rows: data ranks, which have other rows of the batch; microbatches: of each of them.

    memory: of the fullest rank, which is on pipeline rank `stage`; sent: by each rank, None where no formula counts it;
    pipeline: None where there is none.
    """

    rows: int
    microbatches: int
    stage: int
    memory: MemoryEstimate
    sent: tuple[Row, ...] | None
    pipeline: PipelinePlan | None

    @property
    def bytes_sent(self) -> float | None:
        """By a rank in a step."""
        return None if self.sent is None else sum(row.sent for row in self.sent)


def plan_layout(config: RunConfig, gpus: int, device: str = "cuda") -> LayoutPlan:
    """Count a step of `config`, which must be legal on so many ranks, with the kernels of a `device` of this type.

    Raises ConfigError where weights are cut within a node, and nobody has said how many ranks that has.
    """
    if data_mode(config.parallel) == "hybrid" and config.parallel.data_shard is None:
        raise ConfigError("parallel.data_mode=hybrid: how many ranks of a node cut weights? E.g. parallel.data_shard=8")
    rows, shard, ranks = data_ranks(config, gpus), shard_ranks(config, gpus), config.parallel.pipeline
    microbatches = max(1, config.train.global_batch // rows // microbatch(config, rows))
    memories = [estimate(config, rows, shard, stage, device) for stage in range(ranks)]
    stage = max(range(ranks), key=lambda number: memories[number].total)
    return LayoutPlan(
        rows,
        microbatches,
        stage,
        memories[stage],
        tuple(step_traffic(config, rows, shard)) if counts(config) else None,
        plan_pipeline(config, microbatches) if ranks > 1 else None,
    )
