"""The ranks that save or load together, and how they fail together.

A rank that raised alone would leave the others waiting in the next collective; here every rank learns of
every failure and raises too.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from nemohybrid import errors
from nemohybrid.errors import CheckpointError, NemohybridError

T = TypeVar("T")


class World:
    """The ranks of `process_group`, or this process alone where torch.distributed is not initialised."""

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.group = process_group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(process_group) if self.distributed else 0
        self.size = dist.get_world_size(process_group) if self.distributed else 1

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; everyone gets its own result.

        Where it raises on any rank, every rank raises an error that names the first such rank: of the same class where it
        is one of ours, else a CheckpointError.
        """
        if not self.distributed:
            return action()
        try:
            result, failure = action(), None
        except Exception as error:
            result, failure = None, error
        failures = self.exchange(None if failure is None else (type(failure).__name__, describe(failure)))
        for rank, told in enumerate(failures):
            if told is not None:
                raise class_of(told[0])(f"rank {rank}: {told[1]}") from failure
        return cast(T, result)

    def gather(self, action: Callable[[], T]) -> list[T]:
        """Like `together`, but everyone gets all results in rank order."""
        return self.exchange(self.together(action))

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; everyone gets its result, or its failure."""
        return cast(T, self.gather(lambda: action() if self.rank == 0 else None)[0])

    def exchange(self, item: Any) -> list[Any]:
        """What every rank passed, in rank order."""
        if not self.distributed:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items


def class_of(name: str) -> type[NemohybridError]:
    """One of our errors by its name."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, NemohybridError) else CheckpointError


def describe(error: Exception) -> str:
    """An error in one line; our own messages speak for themselves."""
    return str(error) if isinstance(error, NemohybridError) else f"{type(error).__name__}: {error}"
