"""Where a step went wrong: the first tensor that is not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.checkpoint.world import World
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.stage import Stage
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.data import Replicated
from nemohybrid.parallel.layout import local
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import stage_states, summed_losses
from nemohybrid.train.passes import Passes


def all_finite(*tensors: Tensor) -> bool:
    """Whether no NaN and no infinity is in any; one wait for the device."""
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


def first_bad_tensor(model: HybridModel, batch: Batch, microbatch: int, context: ParallelContext) -> str:
    """Repeat a step that was not finite, pass by pass, and say what was so first, on which rank. Collective.

    Leaves the model without gradients. Costs a step, once: the run cannot go on anyway.
    """
    findings = World().gather(lambda: _on_this_rank(model, batch, microbatch, context))
    found = [(*moment, rank, what) for rank, own in enumerate(findings) for moment, what in own]
    if found:
        *_, rank, what = min(found)
        return f"{what} on rank {rank}"
    return "none when the step is repeated: only a sum over all of them overflows, or a device failed"


Finding = tuple[tuple[int, int, int], str]
"""When it came about (microbatch, phase of it, stage of the pipeline on the way), and what it is."""
OUTPUT, LOSS, GRADIENT = range(3)
WHAT = {OUTPUT: "the output of ", LOSS: "the ", GRADIENT: "the gradient of "}


def _on_this_rank(model: HybridModel, batch: Batch, microbatch: int, context: ParallelContext) -> list[Finding]:
    """The first bad weight, and the first bad thing in each microbatch: layer outputs, then loss, then gradients."""
    bad = next((name for name, p in model.named_parameters() if not all_finite(local(p))), None)
    found: list[Finding] = [((0, 0, 0), f"weight {bad}, already before the step,")] if bad else []
    parts = list(batch.split(microbatch))
    for number, part in enumerate(parts, 1):
        phase, name = _in_microbatch(model, part, part.tokens.shape[0] / batch.tokens.shape[0], context)
        if name:
            stage = _stage_of(model, name)
            when = number, phase, -stage if phase == GRADIENT else stage
            found.append((when, f"{WHAT[phase]}{name} in microbatch {number} of {len(parts)}"))
    return found


def _stage_of(model: HybridModel, name: str) -> int:
    """The stage of a pipeline that has a module or parameter of this rank."""
    number = next((int(part) for part in name.split(".")[1:2] if name.startswith("layers.")), None)
    if number is not None:
        return next(stage.number for stage in model.stages if number in stage.layers)
    return model.stages[0 if name.startswith("embedding") else -1].number


def _in_microbatch(model: HybridModel, part: Batch, share: float, context: ParallelContext) -> tuple[int, str]:
    """The phase in which something was bad first, and its name, "" for nothing.

    To the end, whatever is found: ranks that share the model compute together, and others may find nothing.
    """
    losses: list[Tensor] = []

    def forward(stage: Stage, _: int, x: Tensor | None) -> Tensor:
        if not stage.is_last:
            return stage_states(model, part, share, stage, x)
        losses.append(summed_losses(model, part, share, stage, x).sum() / part.labels.numel())
        return losses[0]

    model.zero_grad(set_to_none=True)
    with _bad_outputs(model) as bad:
        Passes(model, [part], context).train(forward, Replicated(model, context))
    name = bad_gradient(model)
    model.zero_grad(set_to_none=True)
    if bad:
        return OUTPUT, bad[0]
    if losses and not all_finite(losses[0]):
        return LOSS, "loss"
    return GRADIENT, name or ""


def bad_gradient(model: nn.Module) -> str | None:
    """The parameter whose gradient stops being finite first in the backward pass, which goes from the last to the first."""
    gradients = ((name, local(p.grad)) for name, p in reversed(list(model.named_parameters())) if p.grad is not None)
    return next((name for name, gradient in gradients if not all_finite(gradient)), None)


@contextmanager
def _bad_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose output is not finite, in the order in which they finish: parts before the whole."""
    bad: list[str] = []

    def watch(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not all_finite(output):
                bad.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
