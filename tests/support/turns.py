"""Tests that watch the clock have the machine to themselves, however many workers share the others."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

QUEUE, RUNNING = range(2)
"""Bytes of a file that workers lock. Record locks are not inherited by the ranks that tests fork."""


@contextmanager
def turn(item: pytest.Item) -> Iterator[None]:
    """Where tests have several workers: wait for those of others, if this one is marked `alone`, or for such a one of theirs."""
    cache = getattr(item.config, "cache", None)
    if cache is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with (cache.mkdir("turns") / "lock").open("w+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, QUEUE)  # nobody overtakes one that waits for all others
        fcntl.lockf(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH, 1, RUNNING)
        fcntl.lockf(file, fcntl.LOCK_UN, 1, QUEUE)
        yield  # closing the file gives the place away
