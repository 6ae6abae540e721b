"""Gradients after the backward pass: summed over data-parallel ranks, measured, clipped."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import Group

_BUCKET_ELEMENTS = 32 * 1024 * 1024


def sum_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Sum every gradient over `group`, in fp32 and in buckets of a fixed order, so that repeated runs agree bitwise.

    A parameter that took no part in this rank's microbatches (an expert without tokens, say) counts as zero.
    """
    if group.handle is None:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(g.numel() for g in bucket) >= _BUCKET_ELEMENTS:
            _sum_bucket(bucket, group)
            bucket = []
    _sum_bucket(bucket, group)


def _sum_bucket(bucket: list[Tensor], group: Group) -> None:
    if not bucket:
        return
    flat = sum_over(torch.cat([g.reshape(-1).float() for g in bucket]), group)
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm over all gradients, an fp32 scalar tensor."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm, known to be `norm`, is at most `limit`."""
    clip_grads_with_norm_(parameters, limit, norm)
