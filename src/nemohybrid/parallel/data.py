"""How data-parallel ranks share weights, gradients and optimizer state: each holds everything, or FSDP cuts it.

The rest of the program sees one thing of both: `parameters`, plain tensors of what this rank trains, with their gradients
after `finish`. Cut parameters are views of FSDP's own storage, so that optimizer, norm and checkpoints need not know of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import sum_gradients, sum_partial_gradients
from nemohybrid.parallel.layout import ParamLayout, attach, layout_of, local

Unit = tuple[nn.Module, Sequence[nn.Module]]
"""A module whose weights are gathered while it runs, and those of its parts that use a cast of their weights alone."""


class Replicated:
    """Every data rank holds everything; gradients are summed once a step."""

    def __init__(self, model: nn.Module, context: ParallelContext) -> None:
        self.context = context
        self.parameters = dict(model.named_parameters())

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one of the step's microbatches."""
        yield

    def finish(self) -> None:
        """After the backward pass of the last microbatch: gradients of the global batch. Collective."""
        sum_gradients(self.parameters.values(), self.context.data)
        sum_partial_gradients(self.parameters.values(), self.context)

    def release(self) -> None:
        """After a forward pass without a backward pass."""


class Sharded:
    """FSDP2: each data rank trains some rows of every parameter (Zhao et al. 2023, arXiv 2304.11277).

    `model` is on the meta device, and is cut in place. Sums of gradients are in fp32, over microbatches and over ranks, and
    are sums, not means: the loss is a mean over the global batch already.
    """

    def __init__(
        self,
        model: nn.Module,
        context: ParallelContext,
        units: Iterable[Unit],
        entry: str,
        keep_weights: bool = False,
        dtype: torch.dtype = torch.float32,
        reduce_every_microbatch: bool = False,
    ) -> None:
        """entry: the method of `model` that a pass begins with. keep_weights: once gathered, until the step's last backward
        pass. dtype: what weights are sent in that are cast to it anyway.
        """
        self.context, self.model, self.keep_weights = context, model, keep_weights
        self.reduce_every_microbatch = reduce_every_microbatch
        layouts = {name: layout_of(tensor) for name, tensor in model.named_parameters()}
        self.root = _cut(model, context, list(units), entry, not keep_weights, dtype)
        for name, tensor in model.named_parameters():
            attach(tensor, replace(layouts[name], rows=_rows(layouts[name], context)))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> what this rank trains of it; made once the model has memory."""
        return {name: _own(tensor) for name, tensor in self.model.named_parameters()}

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one of the step's microbatches; gradients are sent in the last one alone."""
        self.root.set_requires_gradient_sync(last or self.reduce_every_microbatch)
        if self.keep_weights:
            self.root.set_reshard_after_backward(last)
        yield

    def finish(self) -> None:
        """As of `Replicated`."""
        for tensor, own in zip(self.model.parameters(), self.parameters.values(), strict=True):
            own.grad, tensor.grad = None if tensor.grad is None else local(tensor.grad), None
        sum_partial_gradients(self.parameters.values(), self.context)

    def release(self) -> None:
        """Give back the weights that were gathered and that no backward pass gave back."""
        for module in _of_fsdp(self.model):
            module.reshard()


DataRanks = Replicated | Sharded


def _cut(
    model: nn.Module, context: ParallelContext, units: list[Unit], entry: str, reshard: bool, dtype: torch.dtype
) -> Any:
    """Units first, what is left last, as FSDP wants it. Units prefetch their successor."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    def policy(sent_in: torch.dtype) -> Any:
        return MixedPrecisionPolicy(sent_in, torch.float32, cast_forward_inputs=False)

    for module, casting in units:
        options = {"mesh": context.mesh, "reshard_after_forward": reshard}
        if casting and dtype != torch.float32:
            fully_shard(list(casting), mp_policy=policy(dtype), **options)
        fully_shard(module, mp_policy=policy(torch.float32), **options)
    root: Any = fully_shard(model, mesh=context.mesh, mp_policy=policy(torch.float32), reshard_after_forward=False)
    register_fsdp_forward_method(model, entry)
    for module in _of_fsdp(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for (module, _), (following, casting) in pairwise(units):
        also = casting[:1] if dtype != torch.float32 else []  # any of its modules stands for the second group
        module.set_modules_to_forward_prefetch([following, *also])  # pyright: ignore[reportCallIssue]
    return root


def _of_fsdp(model: nn.Module) -> Iterator[Any]:
    """The modules that FSDP has taken over."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _rows(layout: ParamLayout, context: ParallelContext) -> tuple[int, int]:
    """FSDP's cut along axis 0: chunks of equal length, the last ones shorter or empty."""
    rows, group = layout.tensor_shape[0], context.shard
    chunk = -(-rows // group.size)
    return min(rows, group.rank * chunk), min(rows, (group.rank + 1) * chunk)


def _own(tensor: nn.Parameter) -> nn.Parameter:
    own, layout = nn.Parameter(local(tensor).detach()), layout_of(tensor)
    assert layout.rows is not None
    assert own.shape[0] == layout.rows[1] - layout.rows[0], "FSDP cut other rows than the layout says"
    return attach(own, layout)
