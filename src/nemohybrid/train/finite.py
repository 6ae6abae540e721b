"""Where a step went wrong: the first tensor that is not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemohybrid.checkpoint.world import World
from nemohybrid.model.hybrid import HybridModel
from nemohybrid.parallel.layout import local
from nemohybrid.train.batch import Batch
from nemohybrid.train.loss import summed_losses


def all_finite(*tensors: Tensor) -> bool:
    """Whether no NaN and no infinity is in any; one wait for the device."""
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


def first_bad_tensor(model: HybridModel, batch: Batch, microbatch: int) -> str:
    """Repeat a step that was not finite, pass by pass, and say what was so first, on which rank. Collective.

    Leaves the model without gradients. Costs a step, once: the run cannot go on anyway.
    """
    findings = World().gather(lambda: _on_this_rank(model, batch, microbatch))
    for rank, found in enumerate(findings):
        if found:
            return f"{found} on rank {rank}"
    return "none when the step is repeated: only a sum over all of them overflows, or a device failed"


def _on_this_rank(model: HybridModel, batch: Batch, microbatch: int) -> str:
    """In the order of the computation: weights, then for each microbatch layer outputs, loss, gradients. "" if none."""
    bad = next((name for name, p in model.named_parameters() if not all_finite(local(p))), None)
    found = [f"weight {bad}, already before the step,"] if bad else []
    parts = list(batch.split(microbatch))
    for number, part in enumerate(parts, 1):
        if inside := _in_microbatch(model, part, part.tokens.shape[0] / batch.tokens.shape[0]):
            found.append(f"{inside} in microbatch {number} of {len(parts)}")
    return found[0] if found else ""


def _in_microbatch(model: HybridModel, part: Batch, share: float) -> str:
    """To the end, whatever is found: ranks that share the model compute together, and others may find nothing."""
    model.zero_grad(set_to_none=True)
    with _bad_outputs(model) as bad:
        loss = summed_losses(model, part, share).sum() / part.labels.numel()
    loss.backward()
    name = bad_gradient(model)
    model.zero_grad(set_to_none=True)
    if bad:
        return f"the output of {bad[0]}"
    if not all_finite(loss):
        return "the loss"
    return f"the gradient of {name}" if name else ""


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
