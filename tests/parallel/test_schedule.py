"""Schedules do every pass once, cannot deadlock, keep as much as the formulas say, and equal torch's."""

import json
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from forked import run_world
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from nemohybrid.errors import ConfigError
from nemohybrid.parallel.schedule import (
    BACKWARD,
    FORWARD,
    RECEIVE,
    RECEIVE_GRADIENT,
    SCHEDULES,
    SEND,
    SEND_GRADIENT,
    Action,
    forward_orders,
    in_flight,
    legal_microbatches,
    orders,
    with_transfers,
)

PAIRED = {SEND: RECEIVE, SEND_GRADIENT: RECEIVE_GRADIENT}


def is_legal(schedule: str, ranks: int, local: int, microbatches: int) -> bool:
    return {
        "gpipe": True,
        "1f1b": local == 1,
        "interleaved": legal_microbatches(ranks, microbatches),
    }[schedule]


CASES = [
    (schedule, ranks, local * ranks, microbatches)
    for schedule in SCHEDULES
    for ranks in (1, 2, 3, 4, 8)
    for local in (1, 2, 3)
    for microbatches in (1, 2, 3, 4, 5, 8, 10, 12, 16)
    if is_legal(schedule, ranks, local, microbatches)
]

# --- What a schedule must be ------------------------------------------------------------------------------------------


def check_complete(lists, stages, microbatches, kinds=(FORWARD, BACKWARD)):
    """Every pass once, on the rank of its stage."""
    for rank, order in enumerate(lists):
        assert all(action.stage % len(lists) == rank for action in order if action.kind in (FORWARD, BACKWARD))
    passes = Counter(action for order in lists for action in order if action.kind in (FORWARD, BACKWARD))
    wanted = {Action(kind, s, m) for kind in kinds for s in range(stages) for m in range(microbatches)}
    assert passes == Counter(wanted)


class Replay:
    """Runs lists as the strictest backend would: a transfer waits until both its ranks have come to it."""

    def __init__(self, lists, stages):
        self.lists, self.stages = lists, stages
        self.at = [0] * len(lists)
        self.held = [set() for _ in lists]  # for each rank: results computed or received, as computations

    def run(self):
        while any(self.step(rank) for rank in range(len(self.lists))):
            pass
        assert all(at == len(order) for at, order in zip(self.at, self.lists, strict=True)), "the lists deadlock"

    def step(self, rank: int) -> bool:
        action = self.current(rank)
        if action is None or action.kind in PAIRED.values():
            return False  # the sender moves both
        if action.kind in PAIRED:
            return self.transfer(rank, action)
        for needed in self.inputs(action):
            assert needed in self.held[rank], f"rank {rank} runs {action} without {needed}"
        self.held[rank].add(action)
        self.at[rank] += 1
        return True

    def current(self, rank: int):
        return self.lists[rank][self.at[rank]] if self.at[rank] < len(self.lists[rank]) else None

    def inputs(self, action):
        kind, stage, m = action
        if kind == FORWARD:
            return [Action(FORWARD, stage - 1, m)] if stage else []
        return [Action(FORWARD, stage, m)] + [Action(BACKWARD, stage + 1, m)] * (stage + 1 < self.stages)

    def transfer(self, rank: int, action: Action) -> bool:
        peer = action.stage % len(self.lists)
        content = Action(
            *((FORWARD, action.stage - 1) if action.kind == SEND else (BACKWARD, action.stage + 1)), action[2]
        )
        assert content in self.held[rank], f"rank {rank} does {action} before {content}"
        assert peer != rank
        if self.current(peer) != Action(PAIRED[action.kind], *action[1:]):
            return False
        self.held[peer].add(content)
        self.at[rank] += 1
        self.at[peer] += 1
        return True


def check_transfers(lists, stages):
    """Each exactly once on either side, and for two ranks in the same order on both; then the strict replay."""
    common = {}
    for rank, order in enumerate(lists):
        for kind, stage, m in order:
            if kind in (FORWARD, BACKWARD):
                continue
            sends = kind in PAIRED
            producer = stage - 1 if kind in (SEND, RECEIVE) else stage + 1
            peer = (stage if sends else producer) % len(lists)
            assert rank == (producer if sends else stage) % len(lists)
            key = (min(rank, peer), max(rank, peer))
            common.setdefault(key, {}).setdefault(rank, []).append(Action(kind if sends else unpaired(kind), stage, m))
    for pair, sides in common.items():
        first, second = sides.values()
        assert first == second, f"ranks {pair} disagree about the order of their transfers"
        assert max(Counter(first).values()) == 1
    Replay(lists, stages).run()


def unpaired(kind: str) -> str:
    return next(send for send, receive in PAIRED.items() if receive == kind)


def most_in_flight(order) -> int:
    live = peak = 0
    for action in order:
        live += {FORWARD: 1, BACKWARD: -1}.get(action.kind, 0)
        peak = max(peak, live)
    return peak


def test_every_pass_once_and_nothing_deadlocks():
    for case in CASES:
        lists, (_, _, stages, microbatches) = orders(*case), case
        check_complete(lists, stages, microbatches)
        both = with_transfers(lists)
        check_transfers(both, stages)
        assert tuple(tuple(a for a in o if a.kind in (FORWARD, BACKWARD)) for o in both) == lists, case


def test_gradients_are_summed_in_the_order_of_microbatches():
    for case in CASES:
        for order in orders(*case):
            for stage in {action.stage for action in order}:
                backward = [a.microbatch for a in order if a.kind == BACKWARD and a.stage == stage]
                assert backward == sorted(backward), case


def test_microbatches_in_flight_are_those_of_the_formula():
    for schedule, ranks, stages, microbatches in CASES:
        for rank, order in enumerate(orders(schedule, ranks, stages, microbatches)):
            assert most_in_flight(order) == in_flight(schedule, rank, ranks, stages, microbatches)


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches", "formula"),
    [
        ("gpipe", 4, 16, lambda rank: 16),
        ("gpipe", 8, 16, lambda rank: 32),
        ("1f1b", 4, 16, lambda rank: 4 - rank),
        ("1f1b", 4, 2, lambda rank: min(2, 4 - rank)),
        ("interleaved", 8, 16, lambda rank: (2 - 1) * 4 + 2 * (4 - 1 - rank) + 1),
    ],
)
def test_the_formulas_are_the_published_ones(schedule, stages, microbatches, formula):
    assert [in_flight(schedule, r, 4, stages, microbatches) for r in range(4)] == [formula(r) for r in range(4)]


def test_an_evaluation_runs_forward_only():
    for ranks, local, microbatches in [(1, 1, 3), (2, 1, 5), (2, 3, 5), (4, 2, 8), (3, 2, 1)]:
        lists = forward_orders(ranks, local * ranks, microbatches)
        check_complete(lists, local * ranks, microbatches, kinds=(FORWARD,))
        check_transfers(with_transfers(lists), local * ranks)


def test_one_rank_sends_nothing():
    lists = orders("1f1b", 1, 1, 2)
    assert lists == ((Action(FORWARD, 0, 0), Action(BACKWARD, 0, 0), Action(FORWARD, 0, 1), Action(BACKWARD, 0, 1)),)
    assert with_transfers(lists) == lists
    assert with_transfers(orders("interleaved", 1, 3, 4)) == orders("interleaved", 1, 3, 4)


def test_what_a_rank_computed_is_sent_before_it_computes_again():
    """So that no more than one result waits to be sent."""
    for case in CASES:
        for order in with_transfers(orders(*case)):
            computed = None
            for action in order:
                kind, stage, microbatch = action
                if kind in PAIRED:
                    producer = Action(*((FORWARD, stage - 1) if kind == SEND else (BACKWARD, stage + 1)), microbatch)
                    assert producer == computed, case
                elif kind in (FORWARD, BACKWARD):
                    computed = action


def test_nothing_is_received_long_before_it_is_used():
    """A rank may wait in a receive while it could compute: at most one pass lies between production and its listing."""
    for order in with_transfers(orders("1f1b", 4, 4, 12)):
        waiting = 0
        for kind, *_ in order:
            waiting += (kind in (RECEIVE, RECEIVE_GRADIENT)) - (kind in (FORWARD, BACKWARD))
            waiting = max(waiting, 0)
            assert waiting <= 4


# --- The checks themselves --------------------------------------------------------------------------------------------


def swapped(lists, rank: int, first: Action, second: Action):
    order = list(lists[rank])
    i, j = order.index(first), order.index(second)
    order[i], order[j] = order[j], order[i]
    return (*lists[:rank], tuple(order), *lists[rank + 1 :])


SWAPS = [
    (0, Action(SEND, 1, 0), Action(SEND, 1, 1)),  # one side only: the peers disagree
    (1, Action(RECEIVE, 1, 0), Action(RECEIVE, 1, 1)),
    (1, Action(SEND_GRADIENT, 0, 0), Action(SEND_GRADIENT, 0, 1)),
    (1, Action(RECEIVE, 1, 0), Action(FORWARD, 1, 0)),  # runs before its input is there
    (0, Action(RECEIVE_GRADIENT, 0, 0), Action(BACKWARD, 0, 0)),
    (2, Action(FORWARD, 2, 3), Action(BACKWARD, 2, 3)),
    (2, Action(BACKWARD, 2, 0), Action(SEND_GRADIENT, 1, 0)),  # sends what it does not have
    (1, Action(FORWARD, 1, 1), Action(SEND, 2, 1)),
]


@pytest.mark.parametrize("swap", SWAPS, ids=str)
def test_two_swapped_actions_are_found(swap):
    lists = with_transfers(orders("1f1b", 3, 3, 4))
    check_transfers(lists, 3)
    with pytest.raises(AssertionError):
        check_transfers(swapped(lists, *swap), 3)


@pytest.mark.parametrize("case", [("interleaved", 2, 4, 4), ("gpipe", 2, 4, 3)], ids=str)
def test_any_transfer_moved_on_one_side_is_found(case):
    lists = with_transfers(orders(*case))
    for rank, order in enumerate(lists):
        transfers = [action for action in order if action.kind not in (FORWARD, BACKWARD)]
        for first, second in pairwise(transfers):
            with pytest.raises(AssertionError):
                check_transfers(swapped(lists, rank, first, second), case[2])


def test_a_pass_that_is_lost_or_done_twice_is_found():
    lists = orders("gpipe", 2, 2, 3)
    with pytest.raises(AssertionError):
        check_complete((lists[0][1:], lists[1]), 2, 3)
    with pytest.raises(AssertionError):
        check_complete((lists[0] + lists[0][:1], lists[1]), 2, 3)


def test_orders_that_wait_for_each_other_are_refused():
    lists = orders("1f1b", 2, 2, 2)
    circle = swapped(lists, 0, Action(FORWARD, 0, 0), Action(BACKWARD, 0, 0))
    with pytest.raises(AssertionError, match="wait for each other"):
        with_transfers(circle)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("zigzag", 2, 2, 2), "gpipe, 1f1b, interleaved"),
        (("gpipe", 2, 3, 2), "3 stages cannot be shared by 2 pipeline ranks"),
        (("1f1b", 2, 4, 2), "use interleaved or gpipe"),
        (("gpipe", 2, 2, 0), "at least 1"),
        (("interleaved", 4, 8, 13), "Nearest legal: 12, 15"),
        (("interleaved", 4, 8, 9), "Nearest legal: 8, 10"),
    ],
    ids=str,
)
def test_what_no_schedule_can_run_is_refused(case, message):
    with pytest.raises(ConfigError, match=message):
        orders(*case)


# --- The same as torch's ----------------------------------------------------------------------------------------------


def stand_ins(ranks: int, local: int) -> list[SimpleNamespace]:
    """What torch's schedules ask of the stages of rank 0, without a process group."""
    return [
        SimpleNamespace(
            stage_index=stage,
            num_stages=ranks * local,
            group_rank=0,
            group_size=ranks,
            is_first=stage == 0,
            is_last=stage == ranks * local - 1,
            has_backward=True,
            submod=None,
            device="cpu",
        )
        for stage in range(0, ranks * local, ranks)
    ]


def order_of_torch(kind, ranks: int, local: int, microbatches: int):
    """Its `pipeline_order`, without idle slots and gradient reductions."""
    schedule = kind(stand_ins(ranks, local), microbatches, loss_fn=nn.functional.mse_loss)
    names = {"F": FORWARD, "B": BACKWARD}
    return tuple(
        tuple(
            Action(names[a.computation_type.value], a.stage_index, a.microbatch_index)
            for a in schedule.pipeline_order[rank]
            if a is not None and a.computation_type.value in names
        )
        for rank in range(ranks)
    )


LOOPED = [(r, v, n) for r in (2, 3, 4) for v in (2, 3) for n in (1, 2, 3, 4, 8, 10, 12) if legal_microbatches(r, n)]


@pytest.mark.parametrize(("ranks", "local", "microbatches"), LOOPED)
def test_interleaved_is_that_of_torch(ranks, local, microbatches):
    ours = orders("interleaved", ranks, ranks * local, microbatches)
    assert ours == order_of_torch(ScheduleInterleaved1F1B, ranks, local, microbatches)


@pytest.mark.parametrize(("ranks", "local", "microbatches"), LOOPED)
def test_looped_gpipe_is_that_of_torch_with_microbatches_in_order(ranks, local, microbatches):
    """Torch runs the backward passes of a stage from the last microbatch to the first, and so sums in another order."""

    def in_order(action: Action) -> Action:
        return action._replace(microbatch=microbatches - 1 - action.microbatch) if action.kind == BACKWARD else action

    theirs = order_of_torch(ScheduleLoopedBFS, ranks, local, microbatches)
    ours = orders("gpipe", ranks, ranks * local, microbatches)
    assert ours == tuple(tuple(map(in_order, order)) for order in theirs)


class Recorder(nn.Linear):
    """A stage that writes down its passes as they happen."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.seen: list[tuple[str, int]] = []
        self.passes = 0

    def forward(self, input):
        out, number = super().forward(input), self.passes
        self.passes += 1
        self.seen.append((FORWARD, number))
        if out.requires_grad:  # not while torch 2.11 infers shapes
            out.register_hook(lambda _: self.seen.append((BACKWARD, number)))
        return out


RUNS = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def test_what_torch_runs_is_what_we_plan(tmp_path):
    """Its own `pipeline_order` of 1F1B is wrong but on the first rank in torch 2.11 and 2.13: we look at a run."""
    ranks, microbatches = 3, 5

    def member(rank: int) -> None:
        found = {}
        for name, kind in RUNS.items():
            module = Recorder()
            stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
            schedule = kind(stage, microbatches, loss_fn=nn.functional.mse_loss)
            rows = torch.ones(microbatches, 3)
            schedule.step(*([rows] if rank == 0 else []), **({"target": rows} if rank == ranks - 1 else {}))
            # One pass of shape inference may come before the first microbatch.
            first = module.passes - microbatches
            found[name] = [(kind, number - first) for kind, number in module.seen if number >= first]
        (tmp_path / f"seen{rank}").write_text(json.dumps(found))

    (tmp_path / "world").mkdir()
    failures = run_world(ranks, member, tmp_path / "world")
    assert not failures, failures[0].read_text()
    for name in RUNS:
        for rank, order in enumerate(orders(name, ranks, ranks, microbatches)):
            seen = json.loads((tmp_path / f"seen{rank}").read_text())[name]
            assert [Action(kind, rank, number) for kind, number in seen] == list(order), f"{name}, rank {rank}"
