"""Runs `nemohybrid` with bf16 products computed in fp32 and rounded once, where the CPU has no instructions for bf16.

    python scripts/bench/wide_products.py train experiment=quickstart model.dtype=bfloat16

Such a product is what a GPU computes but for the order of sums. PyTorch's own takes 7 to 11 times as long where a CPU
has AVX2 alone (`--compare` prints the ratios), and a study in bf16 most of its time. A CPU that multiplies bf16 is left alone.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from nemohybrid.__main__ import main

_LIBRARY = torch.library.Library("aten", "IMPL")
"""What it registers ends when it is collected."""


def install() -> bool:
    """Replaces mm and bmm of bf16 on the CPU for this process; False where the CPU needs no such thing."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is the purpose
        for name, product in (("mm", _wide(torch.addmm)), ("bmm", _wide(torch.baddbmm))):
            _LIBRARY.impl(name, product, "CPU")
            _LIBRARY.impl(f"{name}.out", _into(product), "CPU")
    return True


def _wide(product: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """a @ b by a product that is not overridden; beta=0 reads nothing of the first."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != torch.bfloat16:
            return product(a.new_zeros(()), a, b, beta=0)
        return product(a.new_zeros((), dtype=torch.float32), a.float(), b.float(), beta=0).to(a.dtype)

    return multiply


def _into(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out.copy_(product(a, b))

    return multiply


def compare() -> None:
    """Time of PyTorch's bf16 product over that of this one, in turns, medians of 9."""
    torch.set_num_threads(1)
    for m, k, n in ((1024, 128, 384), (1024, 384, 128), (512, 128, 1024)):
        a, b, wide = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16().T, _wide(torch.addmm)
        pairs = [(_seconds(torch.mm, a, b), _seconds(wide, a, b)) for _ in range(9)]
        print(f"[{m}, {k}] @ [{k}, {n}]: {statistics.median(slow / fast for slow, fast in pairs):.1f}")


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    began = time.perf_counter()
    product(a, b)
    return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1:] == ["--compare"]:
        compare()
        sys.exit()
    install()
    sys.exit(main(sys.argv[1:]))
