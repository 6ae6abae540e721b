"""Who is in which group, and how long they wait for each other."""

import datetime
import json
import time

import pytest
import torch
from forked import run_world

from nemohybrid.parallel.collectives import sum_over
from nemohybrid.parallel.context import Axes, Group, ParallelContext
from nemohybrid.parallel.world import divide


def test_tensor_ranks_are_neighbours_and_copies_are_far_apart(tmp_path):
    """Eight ranks: two copies of two parts of two tensor ranks."""

    def place(rank: int) -> None:
        context = divide(torch.device("cpu"), Axes(tensor=2, shard=2))
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
        context = divide(torch.device("cpu"), Axes(tensor=2), timeout=datetime.timedelta(seconds=1))
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


def test_stages_are_far_apart_and_experts_lie_on_a_second_grid(tmp_path):
    """Eight ranks: two stages of two data ranks of two tensor ranks; experts on two ranks of a stage, twice."""
    names = ("tensor", "data", "stage", "pipeline", "onward", "ends", "tokens", "experts.expert", "experts.data")

    def place(rank: int) -> None:
        context = divide(torch.device("cpu"), Axes(tensor=2, pipeline=2, expert=2, expert_tensor=1))
        members = {}
        for name in names:
            here = torch.zeros(8, dtype=torch.int64)
            here[rank] = 1
            owner = context.experts if name.startswith("experts.") else context
            members[name] = sum_over(here, getattr(owner, name.removeprefix("experts."))).nonzero().flatten().tolist()
        (tmp_path / f"place{rank}").write_text(json.dumps(members))

    (tmp_path / "world").mkdir()
    assert not run_world(8, place, tmp_path / "world")
    assert json.loads((tmp_path / "place6").read_text()) == {
        "tensor": [6, 7],
        "data": [4, 6],
        "stage": [4, 5, 6, 7],
        "pipeline": [2, 6],
        "onward": [2, 6],
        "ends": [2, 6],
        "tokens": [4, 5, 6, 7],
        "experts.expert": [6, 7],
        "experts.data": [4, 6],
    }


def test_the_ends_of_a_long_pipeline_meet_and_the_middle_is_alone(tmp_path):
    def place(rank: int) -> None:
        context = divide(torch.device("cpu"), Axes(pipeline=4))
        met = sum_over(torch.tensor(1 << rank), context.ends).item()
        assert met == (0b1001 if rank in (0, 3) else 1 << rank)

    (tmp_path / "world").mkdir()
    failures = run_world(4, place, tmp_path / "world")
    assert not failures, failures[0].read_text()
