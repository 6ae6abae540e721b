"""How data-parallel ranks share weights, gradients and optimizer state: each holds everything, or FSDP cuts it.

The rest of the program sees one thing of both: `parameters`, plain tensors of what this rank trains, with their gradients
after `finish`. Cut parameters are views of FSDP's own storage, so that optimizer, norm and checkpoints need not know of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn

from nemohybrid.parallel.context import ParallelContext
from nemohybrid.parallel.gradients import sum_over_data_ranks, sum_over_ends, sum_partial_gradients
from nemohybrid.parallel.layout import ParamLayout, attach, layout_of, local


@dataclass(frozen=True)
class Unit:
    """A module whose weights are gathered while it runs.

    casting: those of its parts that use a cast of their weights alone; experts: those that hold folded experts, which other
    data ranks share, and whether they use a cast.
    """

    module: nn.Module
    casting: Sequence[nn.Module] = ()
    experts: Sequence[nn.Module] = ()
    experts_cast: bool = True


class Replicated:
    """Every data rank holds everything; gradients are summed once a step."""

    def __init__(self, model: nn.Module, context: ParallelContext) -> None:
        self.context = context
        self.parameters = dict(model.named_parameters())

    def begin(self) -> None:
        """Before the first forward pass of a step."""

    def before_backward(self, modules: Iterable[nn.Module], last: bool, end: bool) -> None:
        """Before a microbatch goes back through `modules`, the units of a pipeline stage.

        last: it is the step's last through them; end: through anything on this rank.
        """

    def finish(self) -> None:
        """After the backward pass of the last microbatch: gradients of the global batch. Collective."""
        sum_over_data_ranks(self.parameters.values(), self.context)
        sum_partial_gradients(self.parameters.values(), self.context)
        sum_over_ends(self.parameters.values(), self.context)

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
        units: Iterable[Sequence[Unit]],
        entry: str,
        keep_weights: bool = False,
        dtype: torch.dtype = torch.float32,
        reduce_every_microbatch: bool = False,
    ) -> None:
        """units: of each stage, in the order in which they run. entry: the method of `model` that a pass begins with.
        keep_weights: once gathered, until the step's last backward pass. dtype: what weights are sent in that are cast to it
        anyway.
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

    def begin(self) -> None:
        """As of `Replicated`. FSDP ends every backward pass with all modules, those of other stages too."""
        if self.keep_weights:
            self.root.set_reshard_after_backward(False)

    def before_backward(self, modules: Iterable[nn.Module], last: bool, end: bool) -> None:
        """As of `Replicated`: gradients are sent with the last microbatch, unless with every one.

        What belongs to no unit stays gathered through a pipeline: other microbatches that went through it wait for theirs.
        """
        every = self.reduce_every_microbatch
        for module in modules:
            module.set_requires_gradient_sync(last or every)  # pyright: ignore[reportCallIssue]
            if self.keep_weights:
                module.set_reshard_after_backward(last)  # pyright: ignore[reportCallIssue]
        self.root.set_requires_gradient_sync(end or every, recurse=False)
        if self.keep_weights or self.context.pipeline.size > 1:
            self.root.set_reshard_after_backward(end, recurse=False)

    def finish(self) -> None:
        """As of `Replicated`."""
        for tensor, own in zip(self.model.parameters(), self.parameters.values(), strict=True):
            own.grad, tensor.grad = None if tensor.grad is None else local(tensor.grad), None
        sum_partial_gradients(self.parameters.values(), self.context)
        sum_over_ends(self.parameters.values(), self.context)

    def release(self) -> None:
        """Give back the weights that were gathered and that no backward pass gave back."""
        for module in _of_fsdp(self.model):
            module.reshard()


DataRanks = Replicated | Sharded


def _cut(
    model: nn.Module,
    context: ParallelContext,
    stages: list[Sequence[Unit]],
    entry: str,
    reshard: bool,
    dtype: torch.dtype,
) -> Any:
    """Units first, what is left last, as FSDP wants it. Units prefetch their successor."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    def policy(sent_in: torch.dtype) -> Any:
        return MixedPrecisionPolicy(sent_in, torch.float32, cast_forward_inputs=False)

    def cut(modules: Any, sent_in: torch.dtype, mesh: Any = context.mesh) -> None:
        fully_shard(modules, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy(sent_in))

    for unit in chain.from_iterable(stages):
        for experts in unit.experts:
            assert context.experts is not None, "folded experts have a grid"
            cut(experts, dtype if unit.experts_cast else torch.float32, context.experts.mesh)
        if unit.casting and dtype != torch.float32:
            cut(list(unit.casting), dtype)
        cut(unit.module, torch.float32)
    root: Any = fully_shard(model, mesh=context.mesh, mp_policy=policy(torch.float32), reshard_after_forward=False)
    register_fsdp_forward_method(model, entry)
    for module in _of_fsdp(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for unit, following in chain.from_iterable(map(pairwise, stages)):
        also = following.casting[:1] if dtype != torch.float32 else []  # any of its modules stands for the second group
        prefetched = [following.module, *also, *following.experts]
        unit.module.set_modules_to_forward_prefetch(prefetched)  # pyright: ignore[reportCallIssue]
    return root


def _of_fsdp(model: nn.Module) -> Iterator[Any]:
    """The modules that FSDP has taken over."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _rows(layout: ParamLayout, context: ParallelContext) -> tuple[int, int]:
    """FSDP's cut along axis 0: chunks of equal length, the last ones shorter or empty."""
    rows = layout.tensor_shape[0]
    group = context.experts.shard if layout.of_experts and context.experts else context.shard
    chunk = -(-rows // group.size)
    return min(rows, group.rank * chunk), min(rows, (group.rank + 1) * chunk)


def _own(tensor: nn.Parameter) -> nn.Parameter:
    own, layout = nn.Parameter(local(tensor).detach()), layout_of(tensor)
    assert layout.rows is not None
    assert own.shape[0] == layout.rows[1] - layout.rows[0], "FSDP cut other rows than the layout says"
    return attach(own, layout)
