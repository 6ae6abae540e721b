"""Who is named for a hang, from records alone; when an alarm is given; what is said of slow ranks."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.train.watch.diagnosis import Facts, alone, report, suspects
from nemohybrid.train.watch.hearing import Hearing
from nemohybrid.train.watch.judge import GRACE_S, Limits, alarm
from nemohybrid.train.watch.processes import GONE, RUNS, STOPPED
from nemohybrid.train.watch.record import DONE, Beat, Entered, LastWords
from nemohybrid.train.watch.sight import DEVICE, Place
from nemohybrid.train.watch.straggler import FAST_AGAIN, SLOW, WINDOW_S, WINDOWS, Slowest, Stragglers
from nemohybrid.train.watch.watching import limits_of
from nemohybrid.train.watch.wording import ranks

SUM = Place("nemohybrid/parallel/collectives.py", 24, "sum_over", "dist.all_reduce(tensor)")
READ = Place("nemohybrid/data/corpus.py", 88, "read", "self.bin[begin:end]")
INNER = Place("mmap.py", 7, "wait_for_disk", "")


def beat(rank: int, **changes) -> Beat:
    return replace(Beat(rank, f"node-{rank // 4}", 1000 + rank, step=7, phase="forward and backward"), **changes)


def waiting(rank: int, count: int = 10, size: int = 8, **changes) -> LastWords:
    """In an all_reduce over the world, the `count`-th."""
    host, groups = f"node-{rank // 4}", {"world": Entered(tuple(range(size)), count)}
    words = LastWords(rank, host, 1000 + rank, 7, "agreement", 0, 2, 61.0, "all_reduce", (SUM,), SUM, groups)
    return replace(words, **changes)


def busy(rank: int, **changes) -> LastWords:
    return waiting(rank, 9, waits_in="", places=(READ,), innermost=INNER, phase="reading data", **changes)


def facts(words: Mapping[int, LastWords], size: int = 8, **beats: Beat) -> Facts:
    known = {rank: beat(rank) for rank in range(size)} | {int(name[1:]): b for name, b in beats.items()}
    return Facts("rank 0 has not moved for 61 s in step 7", size, known, words)


worlds = st.integers(2, 12).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
)


@given(worlds, st.sampled_from(["silent", "busy"]))
def test_exactly_those_that_hold_up_are_named_and_every_rank_is_told_once(world, how):
    size, guilty = world
    words = {r: busy(r, size=size) if r in guilty else waiting(r, size=size) for r in range(size)}
    if how == "silent":
        words = {rank: w for rank, w in words.items() if rank not in guilty}
    told = facts(words, size)
    assert suspects(told).keys() == guilty
    held, waits = report(told).split("Who waits")
    assert all(f"  rank {rank} on node-{rank // 4} (process {1000 + rank}): " in held for rank in guilty)
    innocent = sorted(set(range(size)) - guilty)
    assert f"  {ranks(innocent)} on " in waits
    assert "waiting in all_reduce" in waits
    assert f"at {SUM}" in waits


@given(
    st.integers(3, 12).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))),
    st.sampled_from([8, 11]),
)
def test_one_that_has_skipped_a_collective_or_had_one_too_many_is_named(world, count):
    size, guilty = world
    words = {rank: waiting(rank, count if rank == guilty else 10, size) for rank in range(size)}
    assert suspects(facts(words, size)).keys() == {guilty}
    assert f"rank {guilty} {count}" in report(facts(words, size))


@settings(max_examples=200)
@given(st.data())
def test_a_report_never_fails_and_names_no_rank_that_is_not_there(data):
    size = data.draw(st.integers(1, 9))
    words = {}
    for rank in data.draw(st.sets(st.integers(0, size - 1))):
        changes = {
            "waits_in": data.draw(st.sampled_from(["", "all_reduce", "barrier", DEVICE])),
            "places": data.draw(st.sampled_from([(), (SUM,), (READ, SUM)])),
            "groups": {"data": Entered((0, size - 1), data.draw(st.integers(0, 3)))}
            if data.draw(st.booleans())
            else {},
            "neighbours": {r: data.draw(st.sampled_from([GONE, STOPPED, RUNS])) for r in range(size) if r != rank},
        }
        words[rank] = waiting(rank, **changes)
    known = {rank: beat(rank, left=data.draw(st.sampled_from(["", DONE, "ArithmeticError: x"]))) for rank in words}
    told = Facts("why", size, known, words)
    assert suspects(told).keys() <= set(range(size))
    assert report(told).startswith("this job ends: why\n")
    assert {LastWords.read(w.text()) == w for w in words.values()} <= {True}
    assert {Beat.read(b.text()) == b for b in known.values()} <= {True}


@pytest.mark.parametrize(
    "change, process, told",
    [
        ({}, GONE, "dead: its process is gone"),
        ({}, STOPPED, "its process is stopped, by SIGSTOP or a debugger"),
        ({}, RUNS, "its process runs, but its watch has no turn"),
        ({}, "", "no answer: its process, its host or its network is gone, or it is stopped"),
        ({"left": "DataError: corpus is cut off"}, GONE, "it has ended: DataError: corpus is cut off"),
    ],
)
def test_a_rank_without_an_answer_is_told_by_what_is_known_of_it(change, process, told):
    words = {rank: waiting(rank) for rank in range(7)}
    words[3] = waiting(3, neighbours={7: process} if process else {})
    assert told in report(facts(words, r7=beat(7, **change))), report(facts(words, r7=beat(7, **change)))


@given(
    st.one_of(st.builds(range, st.integers(0, 9), st.integers(0, 60), st.integers(1, 9)), st.sets(st.integers(0, 20)))
)
def test_last_words_say_who_is_in_a_group(members):
    words = waiting(0, groups={"data": Entered(tuple(sorted(members)), 3)})
    assert LastWords.read(words.text()) == words


def test_last_words_of_a_large_job_are_few():
    groups = {"world": Entered(tuple(range(4096)), 9), "data": Entered(tuple(range(3, 4096, 8)), 9)}
    assert len(waiting(3, groups=groups).text()) < 1000


def test_a_rank_that_is_done_is_not_blamed():
    words = {rank: waiting(rank, size=4) for rank in range(2)} | {2: busy(2, size=4)}
    assert suspects(facts(words, 4, r3=beat(3, left=DONE))).keys() == {2}


def test_who_waits_only_for_a_waiting_rank_is_not_named():
    """Rank 1 has not come to its tensor group; rank 0 waits there, and rank 2 for rank 0."""
    tensor, data = Entered((0, 1), 5), Entered((0, 2), 7)
    words = {
        0: waiting(0, groups={"tensor": tensor, "data": replace(data, count=6)}),
        1: waiting(1, groups={"tensor": replace(tensor, count=4)}, waits_in="barrier"),
        2: waiting(2, groups={"data": data}),
    }
    assert suspects(facts(words, 3)).keys() == {1}


def test_on_a_gpu_a_host_whose_queue_is_full_is_not_taken_for_one_that_does_not_come():
    words = {rank: waiting(rank, 10, 4, waits_in="") for rank in range(4)} | {2: busy(2, size=4)}
    assert suspects(facts(words, 4)).keys() == {2}


def test_ranks_that_went_different_ways_are_told_apart():
    words = {rank: waiting(rank, size=4) for rank in range(4)}
    words[2] = replace(words[2], waits_in="barrier", places=(READ,))
    assert suspects(facts(words, 4)) == {2: "it waits elsewhere than others"}
    assert suspects(facts({0: words[0], 2: words[2]}, 0)).keys() == {0, 2}, "of two nobody knows which"


def test_where_all_stand_at_the_same_line_no_rank_is_blamed():
    told = report(facts({rank: waiting(rank) for rank in range(8)}))
    assert "no rank: all stand at the same line, so a network link or a device hangs" in told
    assert (
        "  ranks 0-7 on node-0, node-1: step 7, agreement, stage 0, microbatch 2, for 61 s, waiting in all_reduce"
        in told
    )


def test_a_report_of_a_thousand_ranks_is_short():
    told = facts({rank: busy(rank, size=1000) for rank in range(500)}, 1000)
    assert "and 484 more" in report(told)
    assert len(report(told).splitlines()) < 120


@pytest.mark.parametrize(
    "holder, states, told",
    [
        (0, {0: GONE, 2: RUNS}, {0: "dead: its process is gone. It has the store of the job"}),
        (0, {0: RUNS}, {0: "its process runs. It has the store of the job"}),
        (
            0,
            {},
            {
                0: "no answer: its process, its host or its network is gone, or it is stopped. It has the store of the job"
            },
        ),
        (0, {0: GONE, 2: STOPPED}, {0: "dead", 2: "its process is stopped"}),
        (None, {0: GONE}, {0: "dead: its process is gone"}),
        (None, {0: RUNS}, {}),
    ],
)
def test_a_rank_that_hears_nobody_tells_of_itself_and_of_its_host(holder, states, told):
    text = alone(facts({3: waiting(3, neighbours=states)}), holder)
    held, waits = text.split("Who waits")
    assert {r: words in held for r, words in told.items()} == dict.fromkeys(told, True), text
    assert held.count(" on node-") == len(told), text
    assert bool(told) != ("torchrun has it" in held)
    assert f"at {SUM}" in waits


LIMITS = Limits(10.0, 100.0)


@pytest.mark.parametrize(
    "changes, silent, why",
    [
        ({"still": 9.0, "patient": False}, 0.5, ""),
        ({"still": 10.5, "patient": False}, 0.5, "rank 1 has not moved for 11 s in step 7"),
        ({"still": 0.0, "patient": False}, 10.5, "rank 1 has not moved for 10 s in step 7"),
        ({"still": 99.0, "patient": True}, 0.5, ""),
        ({"still": 100.0, "patient": True}, 0.5, "rank 1 has not moved for 100 s in step 7"),
        ({"left": DONE, "still": 500.0}, 500.0, ""),
        ({"left": "DataError: x"}, GRACE_S - 1, ""),
        ({"left": "DataError: x"}, GRACE_S, "rank 1 has ended: DataError: x"),
    ],
)
def test_when_an_alarm_is_given(changes, silent, why):
    beats = {0: beat(0, patient=False), 1: beat(1, **changes)}
    assert alarm(beats, {0: 0.1, 1: silent}, LIMITS) == why


def test_ranks_that_wait_for_one_that_may_take_long_have_as_long():
    beats = {0: beat(0, phase="saving"), 1: beat(1, still=50.0, patient=False)}
    assert alarm(beats, {0: 0.1, 1: 0.1}, LIMITS) == ""
    assert alarm({0: beat(0, left=DONE)}, {0: 0.0}, LIMITS) == ""
    over = beats | {0: beat(0, patient=False)}
    assert alarm(over, {0: 0.1, 1: 0.1}, LIMITS, hurried=9.0) == ""
    assert "rank 1 has not moved for 50 s" in alarm(over, {0: 0.1, 1: 0.1}, LIMITS, hurried=11.0)


@pytest.mark.parametrize(
    "overrides, limits",
    [
        ([], Limits(240.0, 480.0)),
        (["cluster.hang_seconds=30"], Limits(30.0, 480.0)),
        (["cluster.hang_seconds=30000"], Limits(480.0, 480.0)),
        (["cluster.hang_seconds=0"], None),
    ],
)
def test_limits_lie_below_the_timeout_of_a_collective(configure, overrides, limits):
    assert limits_of(configure(*overrides)) == limits


def windows(speeds: Mapping[int, float], count: int, stragglers: Stragglers, step: float = 0.0) -> list:
    """Slowest and lines of `count` windows of 10 steps of `step` seconds; speeds: rank -> busy seconds a step."""
    found = []
    for n in range(count + 1):
        seconds = 10 * n * (step or max(speeds.values()))
        beats = {r: beat(r, busy=n * 10 * s, looked=seconds, steps=10 * n) for r, s in speeds.items()}
        found.append(stragglers.update(beats, n * (WINDOW_S + 1)))
    return found[1:]


@given(st.integers(2, 9), st.data())
def test_a_slow_rank_is_named_once_and_noise_never(size, data):
    noise = st.floats(1.0, SLOW - 0.05)
    speeds = {rank: data.draw(noise) for rank in range(size)}
    assert [lines for _, lines in windows(speeds, 8, Stragglers([range(size)]))] == [[]] * 8
    slow = data.draw(st.integers(0, size - 1))
    found = windows(speeds | {slow: 1.0 * SLOW * SLOW}, 8, Stragglers([range(size)]))
    assert [len(lines) for _, lines in found] == [0] * (WINDOWS - 1) + [1] + [0] * (8 - WINDOWS)
    line = found[WINDOWS - 1][1][0]
    assert line.startswith(f"rank {slow} on node-{slow // 4} is ")
    assert line.endswith(f"x slower than the median of its peers, for {10 * WINDOWS} steps by now")
    assert isinstance(found[-1][0], Slowest)
    assert found[-1][0].rank == slow


def test_one_slow_window_is_noise_and_a_rank_that_recovers_is_told():
    stragglers, even, slow = Stragglers([range(3)]), dict.fromkeys(range(3), 1.0), {0: 1.0, 1: 1.0, 2: 2.0}
    lines, done = [], dict.fromkeys(range(3), 0.0)
    turns = [even, slow, slow, even, slow, slow, slow, even, even, even, even]
    for n, speeds in enumerate([even, *turns]):
        done = {rank: done[rank] + 10 * speeds[rank] for rank in done}
        beats = {rank: beat(rank, busy=done[rank], looked=20.0 * n, steps=10 * n) for rank in done}
        lines.append(stragglers.update(beats, n * (WINDOW_S + 1))[1])
    assert [len(told) for told in lines] == [0] * 7 + [1, 0, 0, 1, 0]
    assert lines[7] == ["rank 2 on node-0 is 2.0x slower than the median of its peers, for 30 steps by now"]
    assert lines[10] == ["rank 2 on node-0 keeps up again"]
    assert FAST_AGAIN < SLOW


def test_ranks_of_another_pipeline_stage_are_no_measure():
    speeds = {0: 1.0, 1: 1.0, 2: 9.0, 3: 9.0}
    found = windows(speeds, 6, Stragglers([range(2), range(2, 4)]))
    assert all(lines == [] for _, lines in found)
    assert found[-1][0] is not None
    assert found[-1][0].ratio == pytest.approx(1.0)
    assert windows({0: 1.0, 1: 9.0}, 6, Stragglers([[0], [1]]))[-1] == (None, [])


def test_a_rank_that_mostly_waits_itself_holds_nobody_up():
    speeds = {0: 1.0, 1: 1.0, 2: 2.0}
    assert all(lines == [] for _, lines in windows(speeds, 6, Stragglers([range(3)]), step=4.1))
    assert sum(len(lines) for _, lines in windows(speeds, 6, Stragglers([range(3)]), step=3.9)) == 1


def test_peers_that_were_never_seen_to_compute_are_no_division_by_zero():
    found = windows({0: 0.0, 1: 1.0}, WINDOWS, Stragglers([range(2)]))
    assert found[-1][0] == Slowest(1, 100.0)
    assert found[-1][1][0].startswith("rank 1 on node-0 is 100.0x slower")
    assert windows({0: 0.0, 1: 0.0}, 1, Stragglers([range(2)]), step=1.0)[0] == (Slowest(0, 0.0), [])


def test_a_window_has_some_seconds_and_some_steps():
    stragglers = Stragglers([range(2)])
    stragglers.update({r: beat(r) for r in range(2)}, 0.0)
    assert stragglers.update({r: beat(r, busy=9.0, steps=5) for r in range(2)}, WINDOW_S / 2) == (None, [])
    assert stragglers.update({0: beat(0, busy=9.0, steps=1), 1: beat(1, busy=9.0, steps=5)}, WINDOW_S) == (None, [])
    assert stragglers.update({r: beat(r, busy=9.0, steps=5) for r in range(2)}, WINDOW_S + 1)[0] == Slowest(0, 1.0)


@pytest.mark.parametrize(
    "numbers, told", [([], "no rank"), ([3], "rank 3"), ([6, 0, 1, 2], "ranks 0-2, 6"), ([1, 2], "ranks 1, 2")]
)
def test_lists_of_ranks_in_words(numbers, told):
    assert ranks(numbers) == told


def test_a_process_is_only_looked_at_where_its_number_means_the_same():
    """Else a rank in another container, or on another host, would be called dead."""
    hearing = Hearing(None, Beat(0, "vm", 1, pids="here pid:[1]"), [0, 1])  # pyright: ignore[reportArgumentType]
    nobody = 2**22 + 1  # above every process id
    for pids, told in ((hearing.own.pids, {1}), ("elsewhere pid:[1]", set())):
        hearing.heard[1] = beat(1, pid=nobody, pids=pids), 0.0
        assert hearing.gone().keys() == told
    hearing.heard[1] = beat(1, pid=nobody, pids=hearing.own.pids, left=DONE), 0.0
    assert not hearing.gone()
