"""`Trainer`: one run from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemohybrid.checkpoint.files import advice
from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.collectives import largest
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import gradient_norm
from nemohybrid.precision.gemm import bind
from nemohybrid.train.batch import Batch
from nemohybrid.train.checkpointing import Checkpointer
from nemohybrid.train.data import RunData
from nemohybrid.train.evaluation import Evaluation, evaluate
from nemohybrid.train.finite import all_finite, first_bad_tensor
from nemohybrid.train.optimizer import build_optimizer, set_learning_rate
from nemohybrid.train.schedule import learning_rate
from nemohybrid.train.signals import StopSignals
from nemohybrid.train.step import StepResult, compute_gradients, update

if TYPE_CHECKING:
    from nemohybrid.train.callbacks.base import Callback


class Trainer:
    """Builds everything a configuration describes, and runs it.

    `step` counts finished steps; `stopped_by` is the signal that ended `fit` before its last step, 0 for none.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, callbacks: Sequence[Callback]) -> None:
        self.config, self.context, self.callbacks = config, context, callbacks
        self.plan = BatchPlan(config.train, config.data.sequence_length)
        self.data = RunData(config, context)
        self.model = HybridModel.create(config.model, config.run.seed, context)
        bind(self.model.modules(), config.precision.recipe)
        self.model.recompute = config.train.recompute == "layer"
        self.optimizer = build_optimizer(self.model, config.optim)
        self.checkpoints = Checkpointer(config, context, self.data.tokenizer, self.data.identity())
        self.step = self.stopped_by = 0
        self.last_step = config.train.stop_at or config.train.steps
        self.last_evaluation: Evaluation | None = None
        self.last_saved: tuple[int, Path] | None = None
        self.signals = StopSignals()

    @property
    def microbatch(self) -> int:
        """Sequences computed at a time on one rank."""
        return self.config.train.microbatch or self.config.train.global_batch // self.context.data.size

    @property
    def is_complete(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.last_step

    def fit(self, signals: StopSignals | None = None) -> None:
        """Train up to `last_step`, or to the step in which any rank got a signal. Callbacks are closed whatever happens."""
        self.signals = signals or self.signals
        with ExitStack() as closing:
            for callback in reversed(self.callbacks):
                closing.push(partial(self._close, callback))
            self._tell("on_run_start", self)
            with self.signals.deferred():
                while not (self.is_complete or self.stopped_by):
                    result = self.train_step()
                    self._listen()
                    self._tell("on_step_end", self, result)
            if not self.stopped_by:
                self._tell("on_run_end", self)

    def _listen(self) -> None:
        """Agree over all ranks whether a signal came. One in the last step changes nothing: the run is at its end."""
        if not (self.is_complete or self.stopped_by):
            self.stopped_by = largest(self.signals.received, self.context)

    def _tell(self, moment: str, *facts: object) -> None:
        for callback in self.callbacks:
            self._tell_one(callback, moment, *facts)

    def _tell_one(self, callback: Callback, moment: str, *facts: object) -> None:
        """A callback that cannot write ends the run: what it is for would be missing without anybody knowing."""
        try:
            getattr(callback, moment)(*facts)
        except OSError as error:
            name, where = type(callback).__name__, self.config.run.dir
            raise TrainingError(
                f"step {self.step}: {name} cannot write in {where}: {error}. {advice(error)}"
            ) from error

    def _close(self, callback: Callback, failure: type[BaseException] | None, *_: object) -> None:
        """A file that cannot be closed, on a full disk say, must not hide why the run ended."""
        try:
            self._tell_one(callback, "on_close")
        except TrainingError:
            if failure is None:
                raise

    def train_step(self) -> StepResult:
        """The next optimizer step. Raises TrainingError, with nothing changed, when loss or gradient is not finite."""
        started, step = time.perf_counter(), self.step + 1
        lr = learning_rate(self.config, self.plan, step)
        set_learning_rate(self.optimizer, lr)
        batch = self.data.batch(step)
        loss = compute_gradients(self.model, batch, self.microbatch, self.context)
        norm = gradient_norm(self.model.parameters())
        if not all_finite(loss, norm):
            raise TrainingError(f"step {step}: {self._not_finite(batch, loss, norm)}")
        update(self.model, self.optimizer, self.config.optim.clip_grad_norm, norm)
        self.step = step
        tokens = self.plan.samples_before(step + 1) * self.config.data.sequence_length
        seconds = time.perf_counter() - started
        return StepResult(step, loss.item(), norm.item(), lr, self.plan.batch_at(step), tokens, seconds)

    def _not_finite(self, batch: Batch, loss: torch.Tensor, norm: torch.Tensor) -> str:
        """Every rank comes here together: loss and norm are of sums over all."""
        found = first_bad_tensor(self.model, batch, self.microbatch)
        return (
            f"the loss is {loss.item():.4g}, the gradient norm {norm.item():.4g}. First bad tensor: {found}.\n"
            f"Weights and checkpoints are as they were; the newest checkpoint: {self.checkpoints.newest() or 'none yet'}. "
            "Lower optim.lr or optim.clip_grad_norm, or lengthen schedule.warmup, and give the command again."
        )

    def evaluate(self) -> Evaluation:
        """Score the validation corpus and tell the callbacks. A step that ends the run, or a signal, is saved first."""
        self._save_if_ending()
        self.last_evaluation = evaluate(self.model, self.data, self.microbatch, self.step, self._save_if_ending)
        self._tell("on_evaluation", self, self.last_evaluation)
        return self.last_evaluation

    def _save_if_ending(self) -> None:
        """At once: scoring may take longer than the time that is left."""
        self._listen()
        if self.stopped_by or self.is_complete:
            self.save()

    def save(self) -> Path:
        """Write a checkpoint of this moment, once, and tell the callbacks."""
        if self.last_saved is None or self.last_saved[0] != self.step:
            path = self.checkpoints.save(self.step, self.model, self.optimizer)
            self.last_saved = self.step, path
            self._tell("on_checkpoint", self, path)
        return self.last_saved[1]

    def resume(self) -> list[str]:
        """Go on from the checkpoint that `resume` names. Returns what the user must know, in plain words."""
        path, notes = self.checkpoints.find()
        if path is None:
            return notes
        self.step = self.checkpoints.load(path, self.model, self.optimizer)
        where = f"step {self.step} of {self.config.train.steps}"
        if self.is_complete:
            return [*notes, f"already complete: {path} is at {where}, where this run ends"]
        return [*notes, f"resuming from {path}: {where}"]


def use_threads(threads: int | None) -> None:
    """CPU threads of this process."""
    if threads:
        torch.set_num_threads(threads)
