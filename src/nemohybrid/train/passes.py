"""The microbatches of a step on their way through the stages of a model. A model that no pipeline cuts has one stage."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.stage import Stage
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.data import DataRanks
from nemohybrid.parallel.pipeline import Pipeline
from nemohybrid.train.batch import Batch

StageForward = Callable[[Stage, int, Tensor | None], Tensor]
"""(stage, number of the microbatch, what the stage before returned) -> what it hands on; of the last one the loss."""


class Passes:
    """All pipeline ranks have the same `batches`; each runs its own stages of them."""

    def __init__(self, model: HybridModel, batches: Sequence[Batch], context: ParallelContext) -> None:
        self.model, self.batches = model, batches
        count = model.stages[0].count
        self.pipeline = Pipeline(context.pipeline, context.onward, count, model.schedule, context.device, model.dtype)
        self.stages = {stage.number: stage for stage in model.stages}

    def train(self, forward: StageForward, shared: DataRanks) -> None:
        """Forward and backward. Collective over the pipeline."""

        def before_backward(number: int, microbatch: int, end: bool) -> None:
            modules = (unit.module for unit in self.model.sharding_units(self.stages[number]))
            self._begin(number, microbatch)  # a pipeline has just sent others forward
            shared.before_backward(modules, microbatch == len(self.batches) - 1, end)

        if self.model.precision is not None:
            self.model.precision.before_passes()
        shared.begin()
        self.pipeline.train(len(self.batches), self._shape, self._numbered(forward), before_backward)

    def evaluate(self, forward: StageForward) -> None:
        """Forward alone. Collective over the pipeline."""
        self.pipeline.evaluate(len(self.batches), self._shape, self._numbered(forward))

    def _numbered(self, forward: StageForward) -> Callable[[int, int, Tensor | None], Tensor]:
        def numbered(number: int, microbatch: int, x: Tensor | None) -> Tensor:
            self._begin(number, microbatch)
            with self.model.precision.region() if self.model.precision else nullcontext():
                return forward(self.stages[number], microbatch, x)

        return numbered

    def _begin(self, number: int, microbatch: int) -> None:
        self.model.clock.stage, self.model.clock.microbatch = number, microbatch

    def _shape(self, microbatch: int) -> tuple[int, ...]:
        """This rank's tokens of the residual stream."""
        seq = self.batches[microbatch].sequence()
        ranks = self.model.tensor_ranks(seq)
        ranks.check(seq.tokens)
        return seq.tokens // (ranks.group.size if ranks.cut else 1), self.model.config.hidden_size
