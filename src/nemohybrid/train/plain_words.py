"""Failures that torch tells in words of its own, told in ours: memory that runs out, ranks that are gone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nemohybrid.config.run_config import RunConfig
from nemohybrid.errors import TrainingError
from nemohybrid.parallel.context import ParallelContext
from nemohybrid.plan.memory import advice, estimate_of

_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
_PEER_GONE = re.compile(r"gloo/|Connection (closed|reset)|remote process|ncclRemoteError|[Tt]imed out|Watchdog")


@contextmanager
def in_plain_words(config: RunConfig, context: ParallelContext) -> Iterator[None]:
    """Raises TrainingError in place of torch's or Python's "out of memory", and of a collective whose peers are gone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise TrainingError(_out_of_memory(config, context, error)) from error
        if lost_a_peer(error):
            raise TrainingError(_peer_gone(context, error)) from error
        raise


def ran_out_of_memory(error: Exception) -> bool:
    """CUDA's allocator has an exception of its own, the one for CPUs only a text."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_NO_MEMORY.search(str(error)))


def lost_a_peer(error: Exception) -> bool:
    """By the text: Gloo raises a plain RuntimeError, and NCCL's exceptions also stand for set-ups that never worked."""
    return isinstance(error, dist.DistNetworkError) or bool(dist.is_initialized() and _PEER_GONE.search(str(error)))


def _out_of_memory(config: RunConfig, context: ParallelContext, error: Exception) -> str:
    wanted = _WANTED.search(str(error))
    return (
        f"out of memory on rank {context.rank} ({context.device})"
        f"{f': {wanted[1]} more were wanted' if wanted else ''}. Expected of a rank:\n"
        f"{estimate_of(config, context).table()}\n{advice(config, context.device.type)}\n"
        "What was saved is untouched; with smaller microbatches or recomputation the same run goes on from there."
    )


def _peer_gone(context: ParallelContext, error: Exception) -> str:
    return (
        f"rank {context.rank} lost its peers. The rank that failed first says why; the same command goes on from the newest "
        f"checkpoint. What was heard here: {error}"
    )
