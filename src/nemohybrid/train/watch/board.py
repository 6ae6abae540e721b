"""What ranks write for each other in the key-value store of the job, without meeting in any collective.

Why the store of torch.distributed: it is there wherever ranks have met, it is as near as the network and needs no shared file
system, and under torchrun it lives in the launcher, so it survives every rank. A connection of its own, because the
main thread may wait in the store itself, as NCCL does when a rank does not come to set up a group, and would hold the lock.
"""

import datetime
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist

from nemohybrid.checkpoint.world import World

T = TypeVar("T")
PATIENCE_S = 5.0
"""For an answer of the store. It is a few bytes; where it takes longer, its host is gone."""


class Board:
    """One a job. The constructor is collective over the world; nothing else is.

    All methods raise RuntimeError where the store gives no answer.
    """

    def __init__(self) -> None:
        self.name = World().on_first(lambda: uuid.uuid4().hex)  # the store outlives ranks that are started again
        # The store itself is kept, too: with its last owner goes what rank 0 serves.
        self.shared: Any = dist.distributed_c10d._get_default_store()
        self.store = self.shared.clone()
        self.store.set_timeout(datetime.timedelta(seconds=PATIENCE_S))
        self.asking = threading.Lock()

    def write(self, key: str, text: str) -> None:
        """Replaces what was there."""
        self._soon(lambda: self.store.set(self._full(key), text))

    def read(self, key: str) -> str:
        """Empty where nobody has written."""
        full = self._full(key)
        return self._soon(lambda: self.store.get(full).decode() if self.store.check([full]) else "")

    def of_ranks(self, kind: str, ranks: Iterable[int]) -> dict[int, str]:
        """Rank -> what it wrote under `kind`, of those that have."""
        ranks = list(ranks)
        absent = self.silent(kind, ranks)
        keys = {rank: self._full(f"{kind}/{rank}") for rank in ranks if rank not in absent}
        texts = self._soon(lambda: self.store.multi_get(list(keys.values()))) if keys else []
        return {rank: text.decode() for rank, text in zip(keys, texts, strict=True)}

    def silent(self, kind: str, ranks: Iterable[int]) -> set[int]:
        """Those that have written nothing under `kind`. One question where all have."""
        keys = {rank: self._full(f"{kind}/{rank}") for rank in ranks}

        def ask() -> set[int]:
            if not keys or self.store.check(list(keys.values())):
                return set()
            return {rank for rank, key in keys.items() if not self.store.check([key])}

        return self._soon(ask)

    def claim(self, key: str) -> bool:
        """Whether this rank is the first to ask."""
        return self._soon(lambda: self.store.add(self._full(key), 1)) == 1

    def _soon(self, ask: Callable[[], T]) -> T:
        """The answer within `PATIENCE_S`, by a thread of its own: the store's timeout does not hold for `check`, which waits for
        ever where the process that has the store is stopped (torch 2.13), and keeps the lock of the connection.
        """
        if not self.asking.acquire(blocking=False):
            raise RuntimeError("the store of the job gives no answer")  # nor has it to an earlier question
        answer: Future[T] = Future()

        def go() -> None:
            try:
                answer.set_result(ask())
            except RuntimeError as error:
                answer.set_exception(error)
            finally:
                self.asking.release()

        threading.Thread(target=go, name="store", daemon=True).start()
        try:
            return answer.result(PATIENCE_S)
        except TimeoutError:
            raise RuntimeError(f"the store of the job gives no answer for {PATIENCE_S:.0f} s") from None

    def _full(self, key: str) -> str:
        return f"watch/{self.name}/{key}"


def holder() -> int | None:
    """The rank that has the store of the job; None where the launcher of torchrun has it, or another."""
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
