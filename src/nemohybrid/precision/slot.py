"""What a recipe and a policy know of the layer they are for: its name and place, and how its matrices are cut. No model."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nemohybrid.precision.clock import Clock
from nemohybrid.precision.philox import random_bytes
from nemohybrid.precision.recipe import Operand

Amax = Callable[[Tensor], Tensor]
"""The largest magnitude [1] over all ranks that hold parts of a tensor, from that of this rank's part."""

ROLES = ("in_proj", "out_proj", "qkv", "o_proj", "fc1", "fc2", "latent", "expert")
"""Products that a policy may quantize. All others never are: router, vocabulary, and what is no product at all."""


@dataclass(frozen=True)
class Slot:
    """A product with a trained weight.

    name: of the layer's module, as in a checkpoint; role: one of ROLES; layer: its number in the whole model, from 0, of
    `layers`; kind: the symbol of its mixer. outputs, inputs: of its matrix on one rank; experts: how many matrices are
    stacked. mtp: whether it belongs to multi-token prediction; its layers count on after those of the model.

    parts: for "x", "w" and "dy", where ranks hold parts of it, the maximum over them. keeps: whether quantized weights stay
    until weights change; not where a weight is there for a while only.
    """

    name: str
    role: str = "fc1"
    layer: int = 0
    layers: int = 1
    kind: str = "-"
    outputs: int = 0
    inputs: int = 0
    experts: int = 0
    mtp: bool = False
    clock: Clock = field(default_factory=Clock)
    parts: Mapping[str, Amax] = field(default_factory=dict)
    keeps: bool = True

    def random(self, x: Tensor, operand: Operand, what: str, place: tuple[int, int, int]) -> Tensor | None:
        """Random bytes like x for one operand: a function of seed, layer, operand, step, microbatch and rank."""
        if not operand.stochastic:
            return None
        key = self.clock.seed & 0xFFFFFFFF, zlib.crc32(f"{self.name}.{what}".encode())
        return random_bytes(x.shape, key, place, x.device)
