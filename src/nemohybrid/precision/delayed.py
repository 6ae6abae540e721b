"""Delayed scaling: a tensor is scaled by what was largest in steps before, so that it is read once.

The rule is Transformer Engine's (2.20), but for when it is applied: once a step of the optimizer, from the largest of all its
microbatches. There it is once a pass, which a layer that is computed again or a pipeline would do out of order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nemohybrid.precision.formats import FORMATS
from nemohybrid.precision.numerics import FP32_MAX, largest

TENSORS = ("x", "w", "dy")
LENGTH = 1024
"""Steps that are remembered: Transformer Engine's default."""


class DelayedScales(nn.Module):
    """Scales of the three tensors of a layer. Its buffers are saved beside the weights.

    scale [3]; history [length, 3]: the largest of each tensor in steps before, the newest at the row that is overwritten last;
    seen [3]: the largest of this step so far.
    """

    scale: Tensor
    history: Tensor
    seen: Tensor
    maxima: Tensor

    def __init__(self, formats: Sequence[str], length: int = LENGTH, device: torch.device | None = None) -> None:
        super().__init__()
        maxima = [FORMATS[fmt].max if fmt in FORMATS else 1.0 for fmt in formats]  # not all need be quantized
        self.register_buffer("maxima", torch.tensor(maxima, device=device), persistent=False)
        self.register_buffer("scale", torch.ones(3, device=device))
        self.register_buffer("history", torch.zeros(length, 3, device=device))
        self.register_buffer("seen", torch.zeros(3, device=device), persistent=False)

    def scale_of(self, which: str, x: Tensor) -> Tensor:
        """[1], for x; what is largest in x is remembered."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break("delayed scaling remembers what it sees, which no graph of torch.compile does")
        at = TENSORS.index(which)
        torch.maximum(self.seen[at : at + 1], largest(x.detach()), out=self.seen[at : at + 1])
        return self.scale[at : at + 1]

    @torch.no_grad()
    def forget(self) -> None:
        """Before the passes of a step: of x and dy, what evaluation saw, or an attempt that did not count. Weights are the same,
        and may have been quantized already."""
        for which in ("x", "dy"):
            self.seen[TENSORS.index(which)] = 0

    @torch.no_grad()
    def step(self) -> None:
        """After a step of the optimizer, and after `seen` is the largest of all ranks that share these tensors."""
        self.history.copy_(self.history.roll(-1, 0))
        self.history[-1] = self.seen
        most = self.history.amax(0)
        scale = (self.maxima / most).clamp(max=FP32_MAX)
        usable = (most > 0) & most.isfinite()
        self.scale.copy_(torch.where(usable, scale, self.scale))
        self.seen.zero_()


def step_all(states: Sequence[DelayedScales], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
    """`step` of all layers of a rank. reduce: the largest over ranks, of all layers in one exchange."""
    if not states:
        return
    if reduce is not None:
        for state, seen in zip(states, reduce(torch.stack([s.seen for s in states])).unbind(), strict=True):
            state.seen.copy_(seen)
    for state in states:
        state.step()
