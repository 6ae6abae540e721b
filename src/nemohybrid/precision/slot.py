"""What a recipe and a policy know of the layer they are for: its name and place, and how its matrices are cut. No model."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nemohybrid.precision.clock import Clock
from nemohybrid.precision.delayed import DelayedScales
from nemohybrid.precision.philox import random_bytes
from nemohybrid.precision.place import Place
from nemohybrid.precision.recipe import Operand

Amax = Callable[[Tensor], Tensor]
"""The largest magnitude [1] over all ranks that hold parts of a tensor, from that of this rank's part."""


@dataclass(frozen=True)
class Slot(Place):
    """A place on this rank, and what else its recipe needs.

    parts: for "x", "w" and "dy", where ranks hold parts of it, the maximum over them. part: which of them this rank has, where
    they must not draw the same. keeps: whether quantized weights stay until weights change; not where a weight is there for a
    while only.
    """

    clock: Clock = field(default_factory=Clock)
    parts: Mapping[str, Amax] = field(default_factory=dict)
    part: int = 0
    keeps: bool = True
    scales: DelayedScales | None = None

    def random(self, x: Tensor, operand: Operand, what: str, place: tuple[int, int, int]) -> Tensor | None:
        """Random bytes like x for one operand: a function of seed, layer, operand, part, step, microbatch and rank."""
        if not operand.stochastic:
            return None
        key = self.clock.seed & 0xFFFFFFFF, _word(f"{self.name}.{what}.{self.part}")
        return random_bytes(x.shape, key, place, x.device)


def _word(name: str) -> int:
    """32 bits of a name."""
    return zlib.crc32(name.encode())


# A graph of torch.compile cannot look into it. This is `torch.compiler.assume_constant_result`, which would import the compiler,
# and with it Triton, at every start.
setattr(_word, "_dynamo_marked_constant", True)  # noqa: B010
