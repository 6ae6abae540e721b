"""`Trainer`: one run from its first step, or from its newest checkpoint, to its last."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemohybrid.checkpoint.files import advice
from nemohybrid.checkpoint.world import World
from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.ranks import microbatch
from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.observe.metrics import read_metrics
from nemohybrid.parallel.collectives import largest
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import gradient_norm
from nemohybrid.parallel.layout import Parts
from nemohybrid.train.balance import LoadBalance
from nemohybrid.train.batch import Batch
from nemohybrid.train.build import build_model
from nemohybrid.train.checkpointing import Checkpointer
from nemohybrid.train.data import RunData
from nemohybrid.train.evaluation import Evaluation, evaluate, evaluation_is_due
from nemohybrid.train.finite import first_bad_tensor
from nemohybrid.train.initial import load_initial_weights
from nemohybrid.train.optimizer import build_optimizer, set_learning_rate, start_state
from nemohybrid.train.schedule import learning_rate
from nemohybrid.train.signals import StopSignals
from nemohybrid.train.state import model_tensors, run_tensors
from nemohybrid.train.step import StepResult, compute_gradients, mtp_metrics, update, weights_changed
from nemohybrid.train.watch import activity as doing
from nemohybrid.train.watch.activity import Activity

if TYPE_CHECKING:
    from nemohybrid.train.callbacks.base import Callback


NOT_FINITE = 1 << 16
"""What a rank says instead of a signal when its loss or gradient is no number; larger than any signal."""


class Trainer:
    """Builds everything a configuration describes, and runs it.

    `step` counts finished steps; `stopped_by` is the signal that ended `fit` before its last step, 0 for none. What it does
    at the moment, it says in `activity`.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        callbacks: Sequence[Callback],
        activity: Activity | None = None,
    ) -> None:
        self.config, self.context, self.callbacks = config, context, callbacks
        self.activity = activity or Activity()
        self.plan = BatchPlan(config.train, config.data.sequence_length)
        self.data = RunData(config, context)
        self.model, self.shared = build_model(config, context)
        assert self.model.precision is not None, "a model that is built has its products"
        self.activity.clock = self.model.clock
        self.precision, self.parameters = self.model.precision, self.shared.parameters
        self.optimizer = build_optimizer(self.parameters.values(), config.optim)
        self.balance = LoadBalance(self.model, context)
        self.checkpoints = Checkpointer(config, context, self.data.tokenizer, self.data.identity())
        self.step = self.stopped_by = 0
        self.last_step = config.train.stop_at or config.train.steps
        self.last_evaluation: Evaluation | None = None
        self.last_saved: tuple[int, Path] | None = None
        self.signals = StopSignals()
        self.owes_evaluation = False

    @property
    def microbatch(self) -> int:
        """Sequences of `data.sequence_length` tokens that one rank computes at a time."""
        return microbatch(self.config, self.context.rows.size)

    def microbatch_at(self, step: int) -> int:
        """The same for the sequences of a step, which may be shorter: as many tokens."""
        return self.microbatch * self.data.short_rows(step)

    @property
    def is_complete(self) -> bool:
        """Whether no step is left, and no score."""
        return self.step >= self.last_step and not self.owes_evaluation

    def fit(self, signals: StopSignals | None = None) -> None:
        """Train up to `last_step`, or to the step in which any rank got a signal. Callbacks are closed whatever happens."""
        self.signals = signals or self.signals
        with ExitStack() as closing:
            for callback in reversed(self.callbacks):
                closing.push(partial(self._close, callback))
            self._tell("on_run_start", self)
            with self.signals.deferred():
                if self.owes_evaluation:
                    self.evaluate()
                while not (self.is_complete or self.stopped_by):
                    self._tell("on_step_start", self)
                    result = self.train_step()
                    self.activity.enter(doing.CALLBACKS)
                    self._tell("on_step_end", self, result)
            if not self.stopped_by:
                self._tell("on_run_end", self)

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
        self.activity.begin_step(step)
        self._tell_precision(step)
        lr = learning_rate(self.config, self.plan, step)
        set_learning_rate(self.optimizer, lr)
        if not self.data.is_ready(step):
            self.activity.enter(doing.ORDERING)
        batch = self.data.batch(step)
        self.activity.enter(doing.PASSES)
        losses = compute_gradients(self.model, batch, self.microbatch_at(step), self.context, self.shared)
        self.activity.enter(doing.NORM)
        norm = gradient_norm(self.parameters.values(), self.context)
        numbers = torch.cat([norm.float().view(1), losses, self.balance.collect()])
        grad_norm, mean_loss, *others = numbers.tolist()  # the step waits for the device only here
        self.activity.enter(doing.AGREEMENT)
        finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        # One agreement a step, of which a failure is the most urgent: a rank whose device fails may be the only one to see it.
        verdict = largest(self.signals.received if finite else NOT_FINITE, self.context)
        if verdict == NOT_FINITE:
            raise TrainingError(f"step {step}: {self._not_finite(batch, mean_loss, grad_norm)}")
        self.activity.enter(doing.UPDATE)
        update(self.parameters.values(), self.optimizer, self.config.optim.clip_grad_norm, norm)
        weights_changed(self.model)
        self.balance.update_bias()
        self.step = step
        self.stopped_by = 0 if self.is_complete else verdict  # a run that is at its end just ends
        tokens = self.plan.samples_before(step + 1) * self.config.data.sequence_length
        seconds = time.perf_counter() - started
        depths = self.model.mtp_depth
        metrics = mtp_metrics(others[:depths]) | self.balance.metrics(others[depths:])
        metrics |= {"sequence_length": self.data.lengths.at(step)} if len(self.data.mixtures) > 1 else {}
        metrics |= {"moe_repeats": self.model.repeats} if self.model.repeats else {}
        return StepResult(step, mean_loss, grad_norm, lr, self.plan.batch_at(step), tokens, seconds, metrics)

    def _tell_precision(self, step: int) -> None:
        """What random bits depend on, and whether the recipes of later are due."""
        self.model.clock.step = step
        self.precision.at(self.plan.samples_before(step) * self.config.data.sequence_length)

    def _not_finite(self, batch: Batch, loss: float, norm: float) -> str:
        """Collective."""
        found = first_bad_tensor(self.model, batch, self.microbatch_at(self.step + 1), self.context)
        return (
            f"the loss is {loss:.4g}, the gradient norm {norm:.4g}. First bad tensor: {found}.\n"
            f"Weights and checkpoints are as they were; the newest checkpoint: {self.checkpoints.newest() or 'none yet'}. "
            "Lower optim.lr or optim.clip_grad_norm, or lengthen schedule.warmup, and give the command again."
        )

    def evaluate(self) -> Evaluation | None:
        """Score the validation corpus and tell the callbacks.

        None where a signal came first: the step is saved at once, since scoring may take longer than the time that is left,
        and the same command scores it when it goes on.
        """
        by_position = self.config.train.evaluate_positions
        with self.activity.during(doing.EVALUATING):
            evaluation = evaluate(self.model, self.data, self.microbatch, self.step, self._may_go_on, by_position)
        self.shared.release()
        self.model.clock.weights_changed()  # what looks at the next step sees its weights being quantized, too
        if evaluation is not None:
            self.last_evaluation, self.owes_evaluation = evaluation, False
            self._tell("on_evaluation", self, evaluation)
        return evaluation

    def _may_go_on(self) -> bool:
        """Whether no rank got a signal; else the step is saved and the run ends. Collective."""
        self.activity.move()
        self.stopped_by = self.stopped_by or largest(self.signals.received, self.context)
        if self.stopped_by:
            self.save()
        return not self.stopped_by

    def _tensors(self) -> dict[str, torch.Tensor | Parts]:
        """All that this rank saves, and fills to go on."""
        return run_tensors(self.model, self.optimizer, self.parameters) | self.precision.tensors()

    def save(self) -> Path:
        """Write a checkpoint of this moment, once, and tell the callbacks."""
        if self.last_saved is None or self.last_saved[0] != self.step:
            with self.activity.during(doing.SAVING):
                path = self.checkpoints.save(self.step, self._tensors())
            self.last_saved = self.step, path
            self._tell("on_checkpoint", self, path)
        return self.last_saved[1]

    def resume(self) -> list[str]:
        """Go on from the checkpoint that `resume` names. Returns what the user must know, in plain words."""
        path, notes = self.checkpoints.find()
        self.model.clock.weights_changed()
        if path is None:
            held = model_tensors(self.model, self.parameters)
            return [*notes, *load_initial_weights(self.config, held, self.data.tokenizer)]
        start_state(self.optimizer, 0)
        self.step = self.checkpoints.load(path, self._tensors())
        start_state(self.optimizer, self.step)
        self._tell_precision(self.step)  # a step that is still to be scored
        self.last_saved = (self.step, path)
        self.owes_evaluation = World().on_first(self._owes_evaluation)
        where = f"step {self.step} of {self.config.train.steps}{', still to be scored' if self.owes_evaluation else ''}"
        if self.is_complete:
            return [*notes, f"already complete: {path} is at {where}, where this run ends"]
        return [*notes, f"resuming from {path}: {where}"]

    def _owes_evaluation(self) -> bool:
        """Whether the step was saved and its evaluation was not: `metrics.jsonl` knows."""
        metrics = Path(self.config.run.dir) / "metrics.jsonl"
        if not evaluation_is_due(self.config, self.step) or not metrics.is_file():
            return False
        return not any(record["step"] == self.step and "val_loss" in record for record in read_metrics(metrics))


def use_threads(threads: int | None) -> None:
    """CPU threads of this process."""
    if threads:
        torch.set_num_threads(threads)
