"""Cuts are the best there are where that can be checked, better than equal layer counts, and the same on every rank."""

import random
import subprocess
import sys
import time
from itertools import accumulate, combinations, pairwise

import pytest

from nemohybrid.config.compose import load_model_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.parallel.schedule import orders
from nemohybrid.pattern import Pattern, PatternError, Segment, parse
from nemohybrid.plan.cost import Costs, Time, modelled
from nemohybrid.plan.cut import Loads, cut, evenly, stage_times, staged
from nemohybrid.plan.timeline import simulate
from nemohybrid.symbols import parse_pattern

RECIPES = ["nemotron3_super", "nemotron3_nano_30b"]


def recipe(name: str, *words: str) -> RunConfig:
    return load_model_config([f"experiment={name}", *words])


def loads(pattern: Pattern, costs: Costs, ranks: int) -> list[float]:
    """Forward and backward of each rank."""
    times = stage_times(pattern, costs)
    return [sum(time.both for time in times[rank::ranks]) for rank in range(ranks)]


def step(pattern: Pattern, costs: Costs, ranks: int, microbatches: int) -> float:
    stages = len(pattern.segments)
    plan = orders("1f1b" if stages == ranks else "interleaved", ranks, stages, microbatches)
    return simulate(plan, stage_times(pattern, costs), costs.transfer).makespan


def every_cut(pattern: Pattern, segments: int):
    for inner in combinations(range(1, pattern.num_layers), segments - 1):
        borders = (0, *inner, pattern.num_layers)
        yield pattern.cut_at([end - start for start, end in pairwise(borders)])


def random_case(seed: int) -> tuple[Pattern, Costs]:
    draw = random.Random(seed)
    pattern = parse("".join(draw.choices("M*-E", k=draw.randint(4, 9))) + draw.choice(["", "/*E"]))
    ends = [Time(draw.randint(0, 30), draw.randint(0, 60)) for _ in range(3)]
    layers = {symbol: Time(draw.randint(1, 9), draw.randint(1, 20)) for symbol in "M*-E"}
    return pattern, Costs(layers, *ends, mtp_depth=pattern.mtp_depth)


@pytest.mark.parametrize("seed", range(30))
def test_a_segment_a_rank_is_cut_as_well_as_by_trying_everything(seed):
    pattern, costs = random_case(seed)
    for ranks in range(1, 5):

        def judged(candidate: Pattern, ranks: int = ranks) -> tuple[float, float]:
            own = loads(candidate, costs, ranks)
            return max(own), sum(load * load for load in own)

        found = cut(pattern, ranks, ranks, costs)
        assert found.main == pattern.main
        assert all(found.segments)
        assert judged(found) == min(map(judged, every_cut(pattern, ranks)))


@pytest.mark.parametrize("seed", range(10))
def test_what_the_search_goes_by_is_the_load_of_ranks_and_segments(seed):
    pattern, costs = random_case(seed)
    for candidate in every_cut(pattern, 4):
        borders = tuple(accumulate(map(len, candidate.segments)))
        ranks, segments = loads(candidate, costs, 2), loads(candidate, costs, 4)
        rank, segment, squares = Loads.of(pattern, 4, 2, costs).largest(borders)
        assert (rank, segment) == pytest.approx((max(ranks) / 1e-12, max(segments) / 1e-12))
        assert squares == pytest.approx(sum((load / 1e-12) ** 2 for load in ranks))


@pytest.mark.parametrize("seed", range(12))
def test_several_segments_a_rank_are_cut_nearly_as_well_as_by_trying_everything(seed):
    pattern, costs = random_case(seed)
    found = cut(pattern, 4, 2, costs)
    best = min(step(candidate, costs, 2, 4) for candidate in every_cut(pattern, 4))
    assert all(found.segments)
    assert step(found, costs, 2, 4) <= 1.15 * best
    assert step(found, costs, 2, 4) <= step(evenly(pattern, 4), costs, 2, 4)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("ranks", "local"), [(2, 1), (4, 1), (8, 1), (16, 1), (4, 2), (8, 2)])
def test_a_step_is_faster_than_with_equal_layer_counts(name, ranks, local):
    config = recipe(name)
    pattern, costs = parse_pattern(config.model.pattern), modelled(config)
    found, even = cut(pattern, local * ranks, ranks, costs), evenly(pattern, local * ranks)
    assert step(found, costs, ranks, 4 * ranks) < 0.97 * step(even, costs, ranks, 4 * ranks)


def test_the_stage_with_mtp_has_fewer_layers():
    """Two MTP depths, each with a head, make the end of Nemotron 3 Super as heavy as a dozen layers."""
    (first, *_), (last, *_) = staged(recipe("nemotron3_super", "parallel.pipeline=2"))
    assert len(last.symbols) < len(first.symbols) - 8
    even = evenly(parse("M-M-M"), 2)
    assert even == parse("M-M|-M")


def test_longer_sequences_move_the_border_towards_attention():
    lengths = []
    for length in (1024, 8192, 32768, 131072):
        config = recipe("nemotron3_super", 'model.pattern="(*)x12 (M)x12"', f"data.sequence_length={length}")
        lengths.append(len(cut(parse_pattern(config.model.pattern), 2, 2, modelled(config)).segments[0]))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] + 3


# --- What a run asks for ----------------------------------------------------------------------------------------------


def test_one_rank_has_everything_in_one_segment():
    assert staged(recipe("nemotron3_super", 'model.pattern="M-|M*/*E"')) == ((Segment(0, "M-M*"),),)


def test_cuts_by_hand_stay_and_may_be_empty():
    by_hand = recipe("nemotron3_super", 'model.pattern="|M-|M*|E"', "parallel.pipeline=2")
    assert staged(by_hand) == ((Segment(0, ""), Segment(2, "M*")), (Segment(0, "M-"), Segment(4, "E")))


def test_every_layer_is_on_one_rank_in_order():
    config = recipe("nemotron3_ultra", "parallel.pipeline=4", "parallel.virtual_pipeline=3")
    ranks = staged(config)
    assert [len(own) for own in ranks] == [3] * 4
    visited = [segment for turn in zip(*ranks, strict=True) for segment in turn]
    assert "".join(segment.symbols for segment in visited) == parse_pattern(config.model.pattern).main
    assert all(segment.symbols for segment in visited)
    assert visited[-1].first_layer + len(visited[-1].symbols) == 108


@pytest.mark.parametrize(("segments", "ranks"), [(0, 1), (5, 5), (3, 2)])
def test_what_cannot_be_cut_is_refused(segments, ranks):
    with pytest.raises(PatternError, match="num_layers=4 cannot be cut"):
        cut(parse("M-M*"), segments, ranks, random_case(0)[1])


PRINT = """
from nemohybrid.config.compose import load_model_config
from nemohybrid.plan.cut import staged
words = ["experiment=nemotron3_super", "parallel.pipeline=4"]
print([staged(load_model_config([*words, f"parallel.virtual_pipeline={v}"])) for v in (1, 2)])
"""


def test_every_process_finds_the_same_cut():
    found = [
        subprocess.run(
            [sys.executable, "-c", PRINT], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    words = ["parallel.pipeline=4"]
    own = [staged(recipe("nemotron3_super", *words, f"parallel.virtual_pipeline={v}")) for v in (1, 2)]
    assert found == [f"{own}\n"] * 2


@pytest.mark.parametrize("local", [1, 2])
def test_a_long_pattern_is_cut_in_no_time(local):
    config = recipe("nemotron3_ultra", "parallel.pipeline=8", f"parallel.virtual_pipeline={local}")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        staged(config)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2, "every rank does it at start-up"
