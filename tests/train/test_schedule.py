"""Learning rate and batch size: closed forms, and pure functions of the step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.config.batch_plan import BatchPlan
from nemohybrid.config.compose import load_config
from nemohybrid.config.run_config import RunConfig
from nemohybrid.config.training import BatchRampConfig, ScheduleSection, TrainSection
from nemohybrid.errors import ConfigError
from nemohybrid.train.schedule import learning_rate, schedule_factor

PEAK = 2e-3


def rates(schedule: ScheduleSection, steps: int = 100, **train) -> list[float]:
    """The learning rate of steps 1..`steps`."""
    config = RunConfig(schedule=schedule, train=TrainSection(steps=steps, **train))
    config.optim.lr = PEAK
    plan = BatchPlan(config.train, config.data.sequence_length)
    return [learning_rate(config, plan, step) for step in range(1, steps + 1)]


def test_warmup_is_linear_and_wastes_no_step_at_zero():
    got = rates(ScheduleSection(warmup=10))
    assert got[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])
    assert got[10:] == [PEAK] * 90


SHAPES = {
    "linear": [1.0, 0.75, 0.5, 0.25, 0.0],
    "cosine": [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0],
    "exponential": [1.0, 2 * 0.5**0.25 - 1, math.sqrt(2) - 1, 2 * 0.5**0.75 - 1, 0.0],
    "minus_sqrt": [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0],
}


@pytest.mark.parametrize("style", SHAPES)
def test_wsd_is_stable_and_then_decays_in_its_shape_to_the_minimum(style):
    got = rates(ScheduleSection(warmup=10, decay=20, decay_style=style, min_lr_ratio=0.1))
    assert got[9:80] == [PEAK] * 71
    expected = [PEAK * (0.1 + 0.9 * share) for share in SHAPES[style]]
    assert [got[step - 1] for step in (80, 85, 90, 95, 100)] == pytest.approx(expected, rel=1e-9), style
    assert got[79:] == sorted(got[79:], reverse=True), "the decay must never rise"


def test_cosine_falls_from_the_end_of_the_warmup_to_the_minimum():
    got = rates(ScheduleSection(name="cosine", warmup=20, min_lr_ratio=0.1))
    for step in (20, 40, 60, 100):
        share = (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert got[step - 1] == pytest.approx(PEAK * (0.1 + 0.9 * share)), f"step {step}"


def test_constant_stays_at_the_peak():
    assert rates(ScheduleSection(name="constant", warmup=2, decay=50))[1:] == [PEAK] * 99


def test_a_total_before_the_last_step_ends_the_schedule_there():
    got = rates(ScheduleSection(decay=10, total=50, min_lr_ratio=0.25))
    assert got[39] == PEAK
    assert got[49:] == pytest.approx([PEAK * 0.25] * 51)


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_units_agree_when_the_batch_is_constant(name):
    length = RunConfig().data.sequence_length
    in_steps = rates(ScheduleSection(name=name, warmup=7, decay=30), global_batch=4)
    for unit, size in (("samples", 4), ("tokens", 4 * length)):
        section = ScheduleSection(name=name, unit=unit, warmup=7 * size, decay=30 * size)
        assert rates(section, global_batch=4) == pytest.approx(in_steps, rel=1e-12), unit


def test_stopping_early_leaves_every_rate_as_it_was():
    section = ScheduleSection(warmup=10, decay=50)
    assert rates(section, stop_at=30) == rates(section)


@given(
    r=st.floats(0, 1),
    style=st.sampled_from(sorted(SHAPES)),
    low=st.floats(0, 1),
    name=st.sampled_from(["wsd", "cosine"]),
)
def test_after_the_warmup_the_factor_stays_between_minimum_and_one(r, style, low, name):
    section = ScheduleSection(name=name, decay=50, decay_style=style, min_lr_ratio=low)
    assert low - 1e-12 <= schedule_factor(section, 50 + 50 * r, 100) <= 1 + 1e-12


# --- the batch ramp --------------------------------------------------------------------------------------------------

plans = st.builds(
    lambda start, increment, levels, samples: BatchPlan(
        TrainSection(global_batch=start + increment * levels, batch_ramp=BatchRampConfig(start, increment, samples)),
        sequence_length=32,
    ),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 6),
    st.integers(0, 400),
)


@settings(max_examples=200)
@given(plan=plans, step=st.integers(1, 300))
def test_a_step_takes_exactly_the_samples_between_it_and_the_next(plan, step):
    assert plan.samples_before(step + 1) - plan.samples_before(step) == plan.batch_at(step)
    assert plan.samples_before(1) == 0


@settings(max_examples=200)
@given(plan=plans)
def test_the_ramp_follows_the_samples_consumed_as_megatron_does(plan):
    """Megatron-LM, num_microbatches_calculator.py: batch = start + increment * floor(consumed / samples of a level)."""
    ramp, full = plan.train.batch_ramp, plan.train.global_batch
    levels = (full - ramp.start) // ramp.increment
    consumed = 0
    for step in range(1, 120):
        level = levels if consumed >= ramp.samples or not levels else int(consumed * levels / ramp.samples)
        assert plan.batch_at(step) == ramp.start + ramp.increment * level, f"step {step}, {consumed} samples before"
        consumed += plan.batch_at(step)


def test_without_a_ramp_every_batch_is_full():
    plan = BatchPlan(TrainSection(global_batch=6), 32)
    assert [plan.batch_at(step) for step in (1, 2, 1000)] == [6, 6, 6]
    assert plan.samples_before(1001) == 6000


def test_a_ramp_counts_when_warmup_and_decay_are_held_against_the_run(load_ramped):
    with pytest.raises(ConfigError, match="is longer than the 20 samples of the run"):
        load_ramped("schedule.warmup=21")
    load_ramped("schedule.warmup=20")


@pytest.fixture
def load_ramped():
    """Five steps of 4: a ramp that never leaves its first level."""
    ramp = ["train.batch_ramp.start=4", "train.batch_ramp.increment=4", "train.batch_ramp.samples=1000"]
    fixed = ["data=shakespeare", "train.global_batch=8", "train.steps=5", "schedule.unit=samples", *ramp]
    return lambda *more: load_config([*fixed, *more])
