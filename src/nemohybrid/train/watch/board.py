"""What ranks write for each other in the key-value store of the job, without meeting in any collective.

Why the store of torch.distributed: it is there wherever ranks have met, it is as near as the network and needs no shared file
system, and under torchrun it lives in the launcher, so it survives every rank. A connection of its own, because the
main thread may wait in the store itself, as NCCL does when a rank does not come to set up a group, and would hold the lock.
"""

import datetime
import uuid
from collections.abc import Iterable

import torch.distributed as dist

from nemohybrid.checkpoint.world import World

PATIENCE_S = 5.0
"""For an answer of the store. It is a few bytes; where it takes longer, its host is gone."""


class Board:
    """One a job. The constructor is collective over the world; nothing else is."""

    def __init__(self) -> None:
        self.name = World().on_first(lambda: uuid.uuid4().hex)  # the store outlives ranks that are started again
        self.store = dist.distributed_c10d._get_default_store().clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.store.set_timeout(datetime.timedelta(seconds=PATIENCE_S))

    def write(self, key: str, text: str) -> None:
        """Replaces what was there."""
        self.store.set(self._full(key), text)

    def read(self, key: str) -> str:
        """Empty where nobody has written."""
        full = self._full(key)
        return self.store.get(full).decode() if self.store.check([full]) else ""

    def of_ranks(self, kind: str, ranks: Iterable[int]) -> dict[int, str]:
        """Rank -> what it wrote under `kind`, of those that have. One question where all have."""
        keys = {rank: self._full(f"{kind}/{rank}") for rank in ranks}
        if keys and not self.store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        if not keys:
            return {}
        return {rank: text.decode() for rank, text in zip(keys, self.store.multi_get(list(keys.values())), strict=True)}

    def claim(self, key: str) -> bool:
        """Whether this rank is the first to ask."""
        return self.store.add(self._full(key), 1) == 1

    def _full(self, key: str) -> str:
        return f"watch/{self.name}/{key}"
