"""What a product and its gradients are, and how far apart two tensors."""

from collections.abc import Callable

from torch import Tensor


def passes(gemm: Callable, x: Tensor, weight: Tensor, dy: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """y, dx, dW (and dbias)."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    y = gemm(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def distance(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in the Euclidean norm."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
