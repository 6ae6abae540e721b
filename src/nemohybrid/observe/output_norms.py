"""How large the outputs of every `Linear` are: they grow without bound in runs that diverge (arXiv 2410.16682)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemohybrid.model.hybrid import HybridModel
from nemohybrid.model.linear import Linear
from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import Group
from nemohybrid.parallel.layout import layout_of


def linear_slots(model: HybridModel) -> Iterator[tuple[str, Linear]]:
    """(slot, module) of every Linear, layer after layer: `mamba2.in_proj`, `attention.out_proj`, `mtp.eh_proj`, ..."""
    for layer in model.layers:
        yield from _slots_of_layer(layer, "")
    for block in model.mtp:
        yield "mtp.eh_proj", block.get_submodule("eh_proj")  # pyright: ignore[reportReturnType]
        for layer in block.get_submodule("layers").children():
            yield from _slots_of_layer(layer, "mtp.")


def _slots_of_layer(layer: nn.Module, prefix: str) -> Iterator[tuple[str, Linear]]:
    mixer = layer.get_submodule("mixer")
    kind = type(mixer).__name__.lower()
    for name, module in mixer.named_modules():
        if isinstance(module, Linear):
            yield f"{prefix}{kind}.{name}", module


class OutputNorms:
    """Measures from `attach` to `read`: slot -> for each of its layers the root mean square of what the Linear returned.

    A fused projection has a slot for each of its parts (`attention.qkv.q`). The RMS is the paper's L2 norm of a token's
    output without the factor sqrt(width), so that slots compare. It is over all tokens of all microbatches and ranks.
    Recomputation runs most Linears twice: their squares and their tokens count twice, and the mean is the same.
    """

    def __init__(self, model: HybridModel) -> None:
        self.slots, self.model = list(linear_slots(model)), model
        self._squares: dict[nn.Module, Tensor] = {}  # [out], summed over tokens, fp32
        self._tokens: dict[nn.Module, int] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Begin, from nothing; again where a step is computed again."""
        self.detach()
        self._squares, self._tokens = {}, {}
        self._handles = [module.register_forward_hook(self._look) for _, module in self.slots]
        self.model.before_repeat.append(self.attach)

    def detach(self) -> None:
        """Stop; the model runs as if nobody had ever looked."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.attach in self.model.before_repeat:
            self.model.before_repeat.remove(self.attach)

    def _look(self, module: nn.Module, _: Any, output: Tensor) -> None:
        rows = output.detach().flatten(0, -2).float()
        squares = rows.square().sum(0)
        self._squares[module] = squares + self._squares[module] if module in self._squares else squares
        self._tokens[module] = self._tokens.get(module, 0) + len(rows)

    def read(self, ranks: Group) -> dict[str, list[float]]:
        """Stop, and return what was measured. Collective over `ranks`, which share the batch equally."""
        self.detach()
        found = list(self._mean_squares())
        means = torch.stack([mean for _, mean in found]) if found else torch.zeros(0)
        roots = (sum_over(means, ranks) / ranks.size).sqrt().tolist()
        result: dict[str, list[float]] = {}
        for (name, _), root in zip(found, roots, strict=True):
            result.setdefault(name, []).append(float(f"{root:.4g}"))
        return result

    def _mean_squares(self) -> Iterator[tuple[str, Tensor]]:
        for slot, module in self.slots:
            if module not in self._squares:
                continue  # it did not run: its layers are of no use to this step
            means = self._squares[module] / self._tokens[module]
            for piece, part in zip(layout_of(module.weight).pieces, means.split(module.widths), strict=True):
                yield f"{slot}.{piece.name}" if piece.name else slot, part.mean()
