"""How quantized tensors fare: what is lost at either end of their format, and how far off they are. On sampled steps only."""

from collections import defaultdict

import torch
from torch import Tensor

from nemohybrid.precision.formats import FORMATS
from nemohybrid.precision.hadamard import hadamard
from nemohybrid.precision.numerics import Quantized
from nemohybrid.precision.recipe import Operand


class Health:
    """Collects, on the device, a mean over the passes of a step of each figure of each tensor of each layer.

    underflow: share of numbers that became zero; saturated: share beyond the format's largest; error: |x - q| / |x| in the
    Euclidean norm; scale_spread: powers of two between the largest and the smallest scale of a block; accepted: share of a
    mixture that is FP8. `broken` names the first tensors that held what is no finite number.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], list[Tensor]] = defaultdict(list)
        self._finite: list[tuple[str, Tensor]] = []

    @torch.no_grad()
    def quantized(self, layer: str, which: str, x: Tensor, of: Quantized, operand: Operand) -> None:
        """Take note of x [M, K] of the layer of this name. Experts may have no rows: nothing is lost of nothing."""
        if not x.numel():
            return
        exact = (hadamard(x) if operand.hadamard else x).to(torch.float32)
        got, at_the_end = of.dequantize(), of.values.abs() == FORMATS[operand.format].max
        self._note(layer, which, "underflow", ((got == 0) & (exact != 0)).float().mean())
        self._note(
            layer, which, "saturated", (at_the_end & (got != 0) & (exact.abs() > got.abs() * (1 + 1e-6))).float().mean()
        )
        self._note(layer, which, "error", (got - exact).norm() / exact.norm().clamp(min=1e-30))
        if of.columns:
            self._note(layer, which, "scale_spread", _spread(of.scale))
        self._finite.append((f"{layer}.{which}", exact.isfinite().all()))

    def accepted(self, layer: str, which: str, share: Tensor) -> None:
        """Take note of what a mixture of representations chose."""
        self._note(layer, which, "accepted", share)

    def _note(self, layer: str, which: str, figure: str, value: Tensor) -> None:
        self._sums[layer, which, figure].append(value.detach())

    def figures(self) -> dict[str, float]:
        """`<layer>.<tensor>/<figure>` -> its mean. Waits for the device, once."""
        if not self._sums:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in self._sums.values()]).tolist()
        return {
            f"{layer}.{which}/{figure}": mean for (layer, which, figure), mean in zip(self._sums, means, strict=True)
        }

    def broken(self) -> list[str]:
        """The tensors that held what is no finite number, in the order in which they were made."""
        if not self._finite:
            return []
        finite = torch.stack([good for _, good in self._finite]).tolist()
        return [name for (name, _), good in zip(self._finite, finite, strict=True) if not good]


def _spread(scale: Tensor) -> Tensor:
    """log2 of the largest over the smallest scale above zero; bytes of E8M0 are exponents."""
    if scale.dtype == torch.uint8:
        return (scale.amax().int() - scale.amin().int()).float()
    positive = scale.where(scale > 0, torch.inf).amin()
    return (scale.amax().clamp(min=1e-38) / positive).clamp(min=1e-38).log2().clamp(min=0)
