"""Runs what `parallel.schedule` plans: forward and backward passes of this rank's stages, and what goes between ranks.

Why not the runtime of torch.distributed.pipelining: it sets up a receive buffer for every microbatch of a step (a step of
Nemotron 3 Ultra has hundreds), takes one shape for all, and hands keyword tensors whole to every microbatch. Here a buffer
lives from the transfer to the backward pass, every microbatch has the shape that `shape` says, and what else belongs to a
microbatch never travels: all ranks of a pipeline read the same rows. The orders are those of its schedules.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from nemohybrid.errors import TrainingError
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.schedule import (
    BACKWARD,
    FORWARD,
    RECEIVE,
    RECEIVE_GRADIENT,
    SEND,
    SEND_GRADIENT,
    Orders,
    forward_orders,
    orders,
    with_transfers,
)

ON_THE_WAY = 4
"""Tensors that may have been sent and not be known to have arrived."""
Forward = Callable[[int, int, Tensor | None], Tensor]
"""(stage, microbatch, what the stage before returned) -> what the stage after is given; of the last one the loss, a scalar."""


@dataclass(frozen=True)
class Pipeline:
    """The stages that the ranks of `group` share: stage s is on rank s % ranks.

    onward: the same ranks, for what goes forward, while gradients go through `group`: NCCL does what one group is asked for
    one after the other, and what is ready would wait for what is not. device and dtype of what stages hand on.
    """

    group: Group
    onward: Group
    stages: int
    schedule: str
    device: torch.device
    dtype: torch.dtype

    def train(
        self,
        microbatches: int,
        shape: Callable[[int], tuple[int, ...]],
        forward: Forward,
        before_backward: Callable[[int, int, bool], None] = lambda stage, microbatch, end: None,
    ) -> None:
        """Forward and backward of every microbatch through this rank's stages. Collective over the group.

        shape(microbatch): of what stages hand on. before_backward(stage, microbatch, end) is told what goes back next, and
        whether it is the last of all here.
        """
        plan = with_transfers(orders(self.schedule, self.group.size, self.stages, microbatches))
        _Run(self, shape, forward, before_backward).through(plan)

    @torch.no_grad()
    def evaluate(self, microbatches: int, shape: Callable[[int], tuple[int, ...]], forward: Forward) -> None:
        """Forward alone. Collective over the group."""
        plan = with_transfers(forward_orders(self.group.size, self.stages, microbatches))
        _Run(self, shape, forward).through(plan)


@dataclass
class _Run:
    """One step on one rank, and what waits in the middle of it."""

    pipeline: Pipeline
    shape: Callable[[int], tuple[int, ...]]
    forward: Forward
    before_backward: Callable[[int, int, bool], None] = lambda stage, microbatch, end: None
    inputs: dict[tuple[int, int], "Tensor | Arriving | None"] = field(default_factory=dict)
    graphs: dict[tuple[int, int], object] = field(default_factory=dict)  # where the backward pass begins
    gradients: dict[tuple[int, int], "Tensor | Arriving"] = field(default_factory=dict)  # of outputs
    leaving: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # outputs by the stage that needs them
    leaving_gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    sent: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)  # perhaps still on the way

    def through(self, plan: Orders) -> None:
        own = plan[self.pipeline.group.rank]
        final = next((action for action in reversed(own) if action.kind == BACKWARD), None)
        for action in own:
            if action.kind == BACKWARD:
                self.before_backward(action.stage, action.microbatch, action is final)
            _DO[action.kind](self, action.stage, action.microbatch)
        self.retire(most=0)

    def do_forward(self, stage: int, microbatch: int) -> None:
        key = stage, microbatch
        x = _arrived(self.inputs.get(key))
        trains = torch.is_grad_enabled()
        if x is not None and trains:
            x = x.detach().requires_grad_()
        y = self.forward(stage, microbatch, x)
        self.inputs[key] = x if trains else None
        if trains:
            self.graphs[key] = y if stage == self.pipeline.stages - 1 else get_gradient_edge(y)
        if stage < self.pipeline.stages - 1:
            self.hand_on(self.leaving, self.inputs, (stage + 1, microbatch), y.detach())

    def do_backward(self, stage: int, microbatch: int) -> None:
        key = stage, microbatch
        x = self.inputs.pop(key)
        gradient = _arrived(self.gradients.pop(key, None))
        torch.autograd.backward([self.graphs.pop(key)], [gradient])  # pyright: ignore[reportArgumentType]
        if stage > 0:
            assert isinstance(x, Tensor), "its input has arrived before the forward pass"
            assert x.grad is not None, "a stage has used its input"
            self.hand_on(self.leaving_gradients, self.gradients, (stage - 1, microbatch), x.grad)

    def hand_on(self, away: dict, here: dict, key: tuple[int, int], tensor: Tensor) -> None:
        """To the stage `key` says: over the wire where another rank has it."""
        (away if self.pipeline.group.size > 1 else here)[key] = tensor

    def send(self, stage: int, microbatch: int) -> None:
        self.depart(self.leaving.pop((stage, microbatch)), self.pipeline.onward, stage, microbatch)

    def send_gradient(self, stage: int, microbatch: int) -> None:
        self.depart(self.leaving_gradients.pop((stage, microbatch)), self.pipeline.group, stage, microbatch)

    def depart(self, tensor: Tensor, group: Group, stage: int, microbatch: int) -> None:
        self.check(tensor, microbatch)
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=group.handle, group_dst=stage % group.size)
        assert work is not None, "this rank is in the group"
        self.sent.append((work, tensor))
        self.retire(ON_THE_WAY)

    def check(self, tensor: Tensor, microbatch: int) -> None:
        """Raises TrainingError for what the receiver does not expect: a backend would fill its buffer with anything."""
        shape, dtype = tuple(self.shape(microbatch)), self.pipeline.dtype
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise TrainingError(
                f"a pipeline stage hands on {list(tensor.shape)} in {tensor.dtype}, and not {list(shape)} in {dtype}: "
                "every layer must return what it was given in shape and dtype"
            )

    def retire(self, most: int) -> None:
        """Forget what was sent, but for the last `most`. On a GPU nothing waits in the middle of a step: what has left its
        stream has left; on a CPU a backend says so only to who waits.
        """
        while len(self.sent) > most and (most == 0 or self.pipeline.device.type == "cpu" or self.has_left()):
            work, _ = self.sent.popleft()
            work.wait()

    def has_left(self) -> bool:
        return self.sent[0][0].is_completed()

    def receive(self, stage: int, microbatch: int) -> None:
        self.inputs[stage, microbatch] = self.arriving(microbatch, self.pipeline.onward, source=stage - 1)

    def receive_gradient(self, stage: int, microbatch: int) -> None:
        self.gradients[stage, microbatch] = self.arriving(microbatch, self.pipeline.group, source=stage + 1)

    def arriving(self, microbatch: int, group: Group, source: int) -> "Arriving":
        pipeline = self.pipeline
        buffer = torch.empty(self.shape(microbatch), device=pipeline.device, dtype=pipeline.dtype)
        work = dist.irecv(buffer, group=group.handle, group_src=source % group.size)
        assert work is not None, "this rank is in the group"
        return Arriving(buffer, work)


@dataclass
class Arriving:
    """A tensor on its way."""

    tensor: Tensor
    work: dist.Work


def _arrived(tensor: "Tensor | Arriving | None") -> Tensor | None:
    if isinstance(tensor, Arriving):
        tensor.work.wait()
        return tensor.tensor
    return tensor


_DO = {
    FORWARD: _Run.do_forward,
    BACKWARD: _Run.do_backward,
    SEND: _Run.send,
    SEND_GRADIENT: _Run.send_gradient,
    RECEIVE: _Run.receive,
    RECEIVE_GRADIENT: _Run.receive_gradient,
}
