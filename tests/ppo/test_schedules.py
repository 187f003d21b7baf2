"""Schedules: the first, the last and the middle update of each shape."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.ppo.schedules import Schedule


def factors(schedule, total):
    return [schedule.factor(step, total) for step in range(total)]


def test_constant():
    assert factors(Schedule(), 4) == [1.0] * 4


def test_linear_falls_evenly_toward_its_end():
    assert factors(Schedule(shape="linear"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert factors(Schedule(shape="linear", end=0.2), 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_way_down_in_the_middle_and_flat_at_both_ends():
    values = factors(Schedule(shape="cosine", end=0.1), 100)
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.55)
    assert values[0] - values[1] < 0.001 and values[98] - values[99] < 0.002
    assert values[25] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)


def test_the_warm_up_rises_linearly_and_comes_before_the_fall():
    assert factors(Schedule(warmup=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(Schedule(shape="linear", warmup=2), 6) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_past_the_last_update_it_stays_at_the_end():
    assert Schedule(shape="linear", end=0.3).factor(100, 10) == pytest.approx(0.3)
    assert Schedule(shape="cosine", end=0.3).factor(100, 10) == pytest.approx(0.3)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 20),
    st.floats(0, 1),
    st.integers(1, 30),
)
def test_factors_lie_in_range_and_fall_after_the_warm_up(shape, warmup, end, total):
    values = factors(Schedule(shape=shape, warmup=warmup, end=end), total)
    assert all(0 < v <= 1 + 1e-12 for v in values)
    fall = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fall))
    assert all(v >= end - 1e-12 for v in fall)
