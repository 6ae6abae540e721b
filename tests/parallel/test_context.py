"""Who is in which group, and how long they wait for each other."""

import datetime
import json
import time

import pytest
import torch
from forked import run_world

from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import Group, ParallelContext, divide


def test_tensor_ranks_are_neighbours_and_copies_are_far_apart(tmp_path):
    """Eight ranks: two copies of two parts of two tensor ranks."""

    def place(rank: int) -> None:
        context = divide(torch.device("cpu"), tensor=2, shard=2)
        numbers = {}
        for name in ("tensor", "shard", "data", "world", "tokens"):
            group: Group = getattr(context, name)
            members = torch.zeros(8, dtype=torch.int64)
            members[rank] = 1
            numbers[name] = [
                *sum_over(members, group).nonzero().flatten().tolist(),
                f"rank {group.rank} of {group.size}",
            ]
        (tmp_path / f"place{rank}").write_text(json.dumps(numbers))

    (tmp_path / "world").mkdir()
    assert not run_world(8, place, tmp_path / "world")
    assert json.loads((tmp_path / "place5").read_text()) == {
        "tensor": [4, 5, "rank 1 of 2"],
        "shard": [5, 7, "rank 0 of 2"],
        "data": [1, 3, 5, 7, "rank 2 of 4"],
        "world": [*range(8), "rank 5 of 8"],
        "tokens": [*range(8), "rank 5 of 8"],
    }


def test_a_group_waits_as_long_as_the_job_says(tmp_path):
    """A mesh makes its groups with a timeout of its own, of half an hour."""

    def wait(rank: int) -> None:
        context = divide(torch.device("cpu"), tensor=2, timeout=datetime.timedelta(seconds=1))
        began = time.monotonic()
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
                sum_over(torch.zeros(1), context.tensor)
            assert time.monotonic() - began < 10
        else:
            time.sleep(2)
        (tmp_path / f"done{rank}").touch()

    (tmp_path / "world").mkdir()
    run_world(2, wait, tmp_path / "world")
    assert (tmp_path / "done0").exists(), "rank 0 waited longer"


def test_a_context_is_never_copied():
    import copy

    context = ParallelContext(torch.device("cpu"), tensor=Group(2, 1, object()))  # pyright: ignore[reportArgumentType]
    assert copy.deepcopy(context) is context
    assert copy.deepcopy(context.tensor) is context.tensor
