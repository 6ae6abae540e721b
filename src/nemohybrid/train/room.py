"""The room of exchanges between experts: a step in which it was short does not count, and is computed again."""

import torch
from torch import Tensor

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.moe.layer import MoE
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.train.random_streams import RandomStreams


class Attempts:
    """The attempts at one step. Where rooms are not limited there is one, and nothing is waited for."""

    def __init__(self, model: HybridModel, context: ParallelContext) -> None:
        self.model, self.context = model, context
        self.is_limited = context.experts is not None and context.experts.room > 0
        self.random = RandomStreams(context, seed=0)
        self.before = self.random.states() if self.is_limited else {}

    def was_short(self, losses: Tensor) -> bool:
        """Whether a visit to an expert found no room on any rank, in any layer; then there is twice as much from now on.

        What the step has left, gradients and counts of visits, is cleared, and it will draw what it drew. A step whose
        `losses` are not finite on some rank counts as it is: its routers send everything to the same experts. One wait for
        the device, where rooms are limited. Collective over the world.
        """
        if not self.is_limited:
            return False
        dispatchers = [m.dispatcher for m in self.model.modules() if isinstance(m, MoE) and m.dispatcher is not None]
        counted = torch.stack([torch.zeros_like(losses[0]), (~losses.isfinite()).sum().to(losses.dtype)])
        for dispatcher in dispatchers:
            counted[0] += 0 if dispatcher.overflow is None else dispatcher.overflow > 0
            dispatcher.reset()
        short, bad = sum_over(counted, self.context.world).tolist()
        if not short or bad:
            return False
        for dispatcher in dispatchers:
            dispatcher.grow()
        self._forget()
        return True

    def _forget(self) -> None:
        self.random.restore(self.before)
        for layer in (m for m in self.model.modules() if isinstance(m, MoE)):
            layer.router.losses.tally = None
        self.model.zero_grad(set_to_none=True)
        self.model.repeats += 1
        for forget in list(self.model.before_repeat):
            forget()
