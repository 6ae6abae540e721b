"""How often torch's schedules run the backward pass of a fused function: `python scripts/bench/zero_bubble.py`.

Two CPU ranks with two stages each, four microbatches: 16 backward passes are needed, 8 on each rank. A zero-bubble schedule
computes gradients of inputs first and those of weights later; a function that gives both at once then runs for each. Some
passes of every schedule come before the step, to find out shapes.
"""

import multiprocessing
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

RANKS, STAGES, MICROBATCHES, WIDTH = 2, 4, 4, 16
SCHEDULES = {
    cls.__name__: cls for cls in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble)
}
counted = 0


class Fused(Function):
    """x W^T whose backward pass gives both gradients, as a fused kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """[n, in], [out, in] -> [n, out]."""
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Counted."""
        global counted
        counted += 1
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].T @ x


class Layer(nn.Module):
    """A stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, WIDTH]."""
        return Fused.apply(x, self.weight).tanh()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def stages_of(name: str, rank: int) -> tuple[int, ...]:
    """Looped, but for the schedule that is shaped like a V."""
    return (rank, STAGES - 1 - rank) if "ZBV" in name else (rank, rank + RANKS)


def run(name: str, rank: int, folder: str) -> int:
    """One step; backward passes of this rank."""
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    own = stages_of(name, rank)
    stages = [PipelineStage(Layer(), number, STAGES, torch.device("cpu")) for number in own]
    schedule = SCHEDULES[name](stages, MICROBATCHES, loss_fn=lambda y, _: y.square().sum(), scale_grads=False)
    rows = torch.ones(MICROBATCHES * 2, WIDTH)
    schedule.step(*([rows] if 0 in own else []), **({"target": rows} if STAGES - 1 in own else {}))
    dist.barrier()
    dist.destroy_process_group()
    return counted


def main() -> None:
    """A line a schedule."""
    spawn = multiprocessing.get_context("spawn")
    print(f"torch {torch.__version__}, {STAGES} stages on {RANKS} ranks, {MICROBATCHES} microbatches")
    for name in SCHEDULES:
        with tempfile.TemporaryDirectory() as folder, spawn.Pool(RANKS) as pool:
            counts = pool.starmap(run, [(name, rank, folder) for rank in range(RANKS)])
        print(f"{name}: {sum(counts)} backward passes of fused functions, {STAGES * MICROBATCHES} needed")


if __name__ == "__main__":
    main()
