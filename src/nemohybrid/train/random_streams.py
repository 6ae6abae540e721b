"""Random numbers while a run is on: which ranks draw the same ones, and how they go on after a resume.

Nothing random happens in a step today, but a mixer of a user's own may drop units. What it draws must be the same on all
tensor ranks, which mostly compute the same with it, and differ on data ranks. A stream therefore belongs to a purpose and to
the place of a rank, not to its number: rank 1 of two tensor ranks and rank 1 of two data ranks are different places.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nemohybrid.parallel.context import ParallelContext

PREFIX = "random."


@dataclass(frozen=True)
class RandomStreams:
    """torch's own generators of one rank, of which there is one for the CPU and one for its GPU."""

    context: ParallelContext
    seed: int

    @property
    def place(self) -> str:
        """Where this rank stands: `data00001.tensor00000`, in a pipeline `data00001.tensor00000.pipeline00002`."""
        context = self.context
        place = f"data{context.data.rank:05d}.tensor{context.tensor.rank:05d}"
        return place + (f".pipeline{context.pipeline.rank:05d}" if context.pipeline.size > 1 else "")

    @property
    def layout(self) -> dict[str, int]:
        """What must be the same for saved streams to go on: the number of places, and who holds which tokens."""
        sizes = {"data": self.context.data.size, "tensor": self.context.tensor.size}
        pipeline = {"pipeline": self.context.pipeline.size} if self.context.pipeline.size > 1 else {}
        context = {"context": self.context.context.size} if self.context.context.size > 1 else {}
        return sizes | {"sequence": int(self.context.sequence)} | pipeline | context

    def start(self, step: int = 0) -> None:
        """Seed the streams as of `step`, alike on the tensor ranks of a data rank, and not on those of a pipeline."""
        pipeline = f"/pipeline{self.context.pipeline.rank}" if self.context.pipeline.rank else ""
        digest = hashlib.sha256(f"{self.seed}/{step}/data{self.context.data.rank}{pipeline}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # of every device

    def states(self) -> dict[str, Tensor]:
        """Name -> state, as bytes: `random.cpu.data00001.tensor00000`."""
        states = {f"{PREFIX}cpu.{self.place}": torch.get_rng_state()}
        if self.context.device.type == "cuda":
            states[f"{PREFIX}cuda.{self.place}"] = torch.cuda.get_rng_state(self.context.device)
        return states

    def restore(self, states: dict[str, Tensor]) -> None:
        """Put back what `states` returned on this rank."""
        for name, state in states.items():
            if name.startswith(f"{PREFIX}cuda."):
                torch.cuda.set_rng_state(state, self.context.device)
            else:
                torch.set_rng_state(state)
