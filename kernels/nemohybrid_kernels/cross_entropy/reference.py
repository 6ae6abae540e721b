"""Cross entropy in plain PyTorch, a block of tokens at a time.

Dimensions: T tokens, V vocabulary, n tokens of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemohybrid_kernels.checks import check_shape, maths_dtype

# Logits of a block. On a CPU 1 MB in fp32, the second-level cache of a server core: measured at V = 256 and 4096. Elsewhere
# 256 MB, so that launches do not count: not measured.
_BLOCK_CPU, _BLOCK = 2**18, 2**26


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of every token.

    logits [T, V] of any float type; labels [T] int64 in [0, V). Returns [T] in fp32 (float64 for float64 logits), and
    computes in it; the gradient has the logits' type. Raises ShapeError.
    """
    check_shape("labels", labels, T=logits.shape[0])
    return _CrossEntropy.apply(logits, labels)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and nothing else: neither pass holds more than a block in fp32, whatever the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        maths = maths_dtype(logits)
        losses = [
            -torch.log_softmax(some, -1, dtype=maths).gather(1, label).squeeze(1)
            for some, label in blocks(logits, labels.unsqueeze(1))
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dlogits = dloss * (softmax(logits) - onehot(label))."""
        logits, labels = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for out, some, label, grad in blocks(dlogits, logits, labels.unsqueeze(1), grads[0].unsqueeze(1)):
            p = torch.softmax(some, -1, dtype=grad.dtype).mul_(grad)
            out.copy_(p.scatter_add_(1, label, -grad))
        return dlogits, None


def blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors [T, ...] in step, n rows at a time."""
    n = max(1, (_BLOCK_CPU if logits.device.type == "cpu" else _BLOCK) // max(1, logits.shape[1]))
    return zip(logits.split(n), *(t.split(n) for t in others), strict=True)
