"""Gradients after the backward pass: summed over the ranks that hold summands, measured, clipped."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.parallel.layout import Box, ParamLayout, layout_of

BUCKET_ELEMENTS = 32 * 1024 * 1024
"""Gradients are summed over ranks in runs of about so many."""
_RUN = 2**18


def sum_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Sum every gradient over `group`, in fp32 and in buckets of a fixed order, so that repeated runs agree bitwise.

    A parameter that took no part in this rank's microbatches (an expert without tokens, say) counts as zero.
    """
    if group.handle is not None:
        _sum_in_buckets((_gradient(parameter) for parameter in parameters), group)


def sum_over_data_ranks(parameters: Iterable[nn.Parameter], context: ParallelContext) -> None:
    """Sum gradients over the ranks that hold the same and saw other tokens: for folded experts those of their own grid."""
    parameters = list(parameters)
    dense, experts = (_of_grid(parameters, of_experts) for of_experts in (False, True))
    sum_gradients(dense, context.data)
    if context.experts is not None:
        sum_gradients(experts, context.experts.data)


def sum_over_ends(parameters: Iterable[nn.Parameter], context: ParallelContext) -> None:
    """Sum the gradients of what both ends of a pipeline hold: an embedding that the first stage and the output or the MTP
    blocks of the last one use.
    """
    if context.ends.handle is not None:
        sum_gradients((p for p in parameters if layout_of(p).end is not None), context.ends)


def _of_grid(parameters: Iterable[nn.Parameter], of_experts: bool) -> list[nn.Parameter]:
    return [p for p in parameters if layout_of(p).of_experts == of_experts]


def sum_partial_gradients(parameters: Iterable[nn.Parameter], context: ParallelContext) -> None:
    """Sum over the tensor ranks what are summands there: norms and routers that saw some of the tokens, norms of heads,
    key/value heads that several ranks hold. Layouts say which. Once a step, in buckets.
    """
    if context.tensor.handle is None:
        return
    whole: list[Tensor] = []
    copied: list[tuple[Tensor, Tensor]] = []
    for parameter in parameters:
        layout = layout_of(parameter)
        if is_partial(layout, context):
            whole.append(_gradient(parameter))
        for box in layout.boxes if layout.shard else ():
            if box.copies > 1:
                copied.append((box.of(_gradient(parameter)), _slots(box, parameter, context.tensor)))
    _sum_in_buckets([*whole, *(slots for _, slots in copied)], context.tensor)
    for view, slots in copied:
        view.copy_(slots[context.tensor.rank // (context.tensor.size // len(slots))])


def is_partial(layout: ParamLayout, context: ParallelContext) -> bool:
    """Whether the gradients of this parameter on the tensor ranks are summands."""
    return layout.shard is None and (layout.partial == "always" or (layout.partial == "tokens" and context.sequence))


def _slots(box: Box, parameter: nn.Parameter, tensor: Group) -> Tensor:
    """[parts, ...]: zeros, but for the gradient of the part that this rank and its neighbours hold."""
    view = box.of(_gradient(parameter))
    slots = view.new_zeros(tensor.size // box.copies, *view.shape)
    slots[tensor.rank // box.copies] = view
    return slots


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _sum_in_buckets(gradients: Iterable[Tensor], group: Group) -> None:
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
            _sum_bucket(bucket, group)
            bucket = []
    _sum_bucket(bucket, group)


def _sum_bucket(bucket: list[Tensor], group: Group) -> None:
    if not bucket:
        return
    flat = sum_over(torch.cat([g.reshape(-1).float() for g in bucket]), group)
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter], context: ParallelContext | None = None) -> Tensor:
    """L2 norm over the gradients of the whole model, an fp32 scalar tensor. Collective where ranks hold parts of it.

    Every element counts once, on the first of the ranks that hold it.
    """
    parameters = list(parameters)
    if context is None or context.world_size == 1:
        return _norm([p.grad for p in parameters if p.grad is not None])
    total = _square(_of_grid(parameters, of_experts=False), context, (context.tensor, context.shard))
    if context.experts is not None:
        experts = _of_grid(parameters, of_experts=True)
        total = total + _square(experts, context, (context.experts.block, context.experts.shard))
    return sum_over(total, context.pipeline).sqrt()


def _square(parameters: list[nn.Parameter], context: ParallelContext, groups: Iterable[Group]) -> Tensor:
    """Of the norm over what the ranks of `groups` hold together, an fp32 scalar."""
    owned = [part for parameter in parameters for part in _owned(parameter, context)]
    square = _norm(owned).square() if owned else torch.zeros((), device=context.device)
    for group in groups:
        sum_over(square, group)
    return square


def _norm(gradients: list[Tensor]) -> Tensor:
    """In runs of a fixed length where they lie on a CPU: torch adds the squares there one after the other, in fp32, and is
    off by 2e-6 at 2^18 elements, 1e-5 at a million and a hundredth at a hundred million (measured, torch 2.13).
    """
    return get_total_norm([run for g in gradients for run in (g.reshape(-1).split(_RUN) if g.is_cpu else [g])])


def _owned(parameter: nn.Parameter, context: ParallelContext) -> Iterator[Tensor]:
    """The parts of a gradient that no tensor rank and no pipeline rank before this one holds too."""
    layout = layout_of(parameter)
    if parameter.grad is None or layout.end == 1:
        return
    if layout.shard is not None:
        yield from (box.of(parameter.grad) for box in layout.boxes if box.copy == 0)
    elif context.tensor.rank == 0:
        yield parameter.grad


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm, known to be `norm`, is at most `limit`."""
    clip_grads_with_norm_(parameters, limit, norm)
