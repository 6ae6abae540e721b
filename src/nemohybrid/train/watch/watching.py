"""The watch of a run: from before the model is built until the rank leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.context import Group, ParallelContext
from nemohybrid.train.plain_words import lost_a_peer
from nemohybrid.train.signals import StopSignals
from nemohybrid.train.watch.activity import Activity
from nemohybrid.train.watch.board import Board
from nemohybrid.train.watch.judge import Limits
from nemohybrid.train.watch.record import DONE
from nemohybrid.train.watch.sight import where_raised
from nemohybrid.train.watch.watchdog import Watchdog

SHARE_OF_TIMEOUT = 0.8
"""How much of a collective's timeout may pass before the watch ends a job, which says more than the timeout does."""


@contextmanager
def watched(config: RunConfig, context: ParallelContext, signals: StopSignals) -> Iterator[Activity]:
    """Watch this rank while the block runs; it says in the Activity what it does. Collective where ranks are several.

    An error that says that peers are gone makes all ranks tell where they are, before it goes on its way.
    """
    activity = Activity()
    limits = limits_of(config)
    if context.world_size == 1 or limits is None:
        yield activity
        return
    watchdog = _watchdog(config, context, activity, limits)
    watchdog.start()
    left = DONE
    try:
        yield activity
    except BaseException as error:
        left = f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and lost_a_peer(error):
            with signals.deferred():  # whoever started the job may end the other ranks of it
                watchdog.lost_peers(f"rank {context.rank} lost its peers", where_raised(error))
        raise
    finally:
        watchdog.close(left)


def limits_of(config: RunConfig) -> Limits | None:
    """None where nobody is to watch."""
    cluster = config.cluster
    patience = SHARE_OF_TIMEOUT * cluster.timeout_minutes * 60
    wanted = patience / 2 if cluster.hang_seconds is None else cluster.hang_seconds
    return Limits(min(wanted, patience), patience) if wanted else None


def _watchdog(config: RunConfig, context: ParallelContext, activity: Activity, limits: Limits) -> Watchdog:
    folder, rank, size = Path(config.run.dir), context.rank, context.world_size
    in_stage = size // context.pipeline.size
    stages = [range(first, first + in_stage) for first in range(0, size, in_stage)]
    return Watchdog(Board(), rank, activity, limits, folder, _groups(context), stages, _here(rank, size))


def _here(rank: int, size: int) -> list[int]:
    """The ranks of this host: torchrun and SLURM number them one after the other."""
    first = rank - int(os.environ.get("LOCAL_RANK", rank))
    return list(range(first, min(size, first + int(os.environ.get("LOCAL_WORLD_SIZE", size)))))


def _groups(context: ParallelContext) -> dict[str, tuple[dist.ProcessGroup, tuple[int, ...]]]:
    """Name -> handle and members of the groups of this rank, each once."""
    experts = context.experts
    named: dict[str, Group] = {"world": context.world, "data": context.data, "tensor": context.tensor}
    named |= {
        "context": context.context,
        "shard": context.shard,
        "pipeline": context.pipeline,
        "onward": context.onward,
        "stage": context.stage,
    }
    named |= {"expert": experts.expert, "expert data": experts.data} if experts else {}
    found: dict[str, tuple[dist.ProcessGroup, tuple[int, ...]]] = {}
    for name, group in named.items():
        handle = group.handle
        if handle is not None and all(handle is not other for other, _ in found.values()):
            found[name] = handle, tuple(dist.get_process_group_ranks(handle))
    return found
