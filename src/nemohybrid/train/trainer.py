"""`Trainer`: one run from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.run_config import RunConfig
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.precision.gemm import bind
from nemohybrid.train.checkpointing import Checkpointer
from nemohybrid.train.data import RunData
from nemohybrid.train.evaluation import Evaluation, evaluate
from nemohybrid.train.optimizer import build_optimizer, set_learning_rate
from nemohybrid.train.schedule import learning_rate
from nemohybrid.train.step import StepResult, compute_gradients, update

if TYPE_CHECKING:
    from nemohybrid.train.callbacks.base import Callback


class Trainer:
    """Builds everything a configuration describes, and runs it. `step` counts finished steps."""

    def __init__(self, config: RunConfig, context: ParallelContext, callbacks: Sequence[Callback]) -> None:
        self.config, self.context, self.callbacks = config, context, callbacks
        self.plan = BatchPlan(config.train, config.data.sequence_length)
        self.data = RunData(config, context)
        self.model = HybridModel.create(config.model, config.run.seed, context)
        bind(self.model.modules(), config.precision.recipe)
        self.model.recompute = config.train.recompute == "layer"
        self.optimizer = build_optimizer(self.model, config.optim)
        self.checkpoints = Checkpointer(config, context, self.data.tokenizer)
        self.step = 0
        self.last_step = config.train.stop_at or config.train.steps
        self.last_evaluation: Evaluation | None = None

    @property
    def microbatch(self) -> int:
        """Sequences computed at a time on one rank."""
        return self.config.train.microbatch or self.config.train.global_batch // self.context.data.size

    def fit(self) -> None:
        """Train up to `last_step`. Callbacks are closed whatever happens."""
        try:
            for callback in self.callbacks:
                callback.on_run_start(self)
            while self.step < self.last_step:
                result = self.train_step()
                for callback in self.callbacks:
                    callback.on_step_end(self, result)
            for callback in self.callbacks:
                callback.on_run_end(self)
        finally:
            for callback in self.callbacks:
                callback.on_close()

    def train_step(self) -> StepResult:
        """The next optimizer step."""
        started, step = time.perf_counter(), self.step + 1
        lr = learning_rate(self.config, self.plan, step)
        set_learning_rate(self.optimizer, lr)
        loss = compute_gradients(self.model, self.data.batch(step), self.microbatch, self.context)
        norm = update(self.model, self.optimizer, self.config.optim.clip_grad_norm, step)
        self.step = step
        tokens = self.plan.samples_before(step + 1) * self.config.data.sequence_length
        seconds = time.perf_counter() - started
        return StepResult(step, loss.item(), norm, lr, self.plan.batch_at(step), tokens, seconds)

    def evaluate(self) -> Evaluation:
        """Score the validation corpus and tell the callbacks."""
        self.last_evaluation = evaluate(self.model, self.data, self.microbatch, self.step)
        for callback in self.callbacks:
            callback.on_evaluation(self, self.last_evaluation)
        return self.last_evaluation

    def save(self) -> Path:
        """Write a checkpoint of this moment and tell the callbacks."""
        path = self.checkpoints.save(self.step, self.model, self.optimizer)
        for callback in self.callbacks:
            callback.on_checkpoint(self, path)
        return path

    def resume(self) -> list[str]:
        """Go on from the checkpoint that `resume` names. Returns what the user must know, in plain words."""
        path, notes = self.checkpoints.find()
        if path is None:
            return notes
        self.step = self.checkpoints.load(path, self.model, self.optimizer)
        return [*notes, f"resuming from {path}: step {self.step} of {self.config.train.steps}"]


def use_threads(threads: int | None) -> None:
    """CPU threads of this process."""
    if threads:
        torch.set_num_threads(threads)
