# SPDX-License-Identifier: Apache-2.0
"""The pace of a backup: for all guests and all speeds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pveplug.pacing import IN_FLIGHT, LEAST_RATE, MOST_PATIENCE, PARALLEL_STEPS, Pace

BUDGET = 0.02
latencies = st.none() | st.floats(0, 1)
speeds = st.floats(0, 1e10)
samples = st.lists(st.tuples(latencies, speeds), max_size=300)


@given(samples)
def test_without_a_budget_nothing_is_slowed(seen: list[tuple[float | None, float]]):
    pace = Pace()
    assert not any(pace.sample(*one) for one in seen)
    assert pace == Pace()


@given(samples)
def test_a_step_at_a_time_requests_first_and_never_below_the_least_rate(
    seen: list[tuple[float | None, float]],
):
    pace = Pace(BUDGET)
    for latency, moved in seen:
        step = pace.step
        changed = pace.sample(latency, moved)
        assert abs(pace.step - step) == changed
        if pace.step > step:
            assert latency is not None
            assert latency > BUDGET
        assert 1 <= pace.in_flight <= IN_FLIGHT
        assert pace.ahead == (pace.step == 0)
        assert (pace.rate > 0) == (pace.step > PARALLEL_STEPS)
        assert pace.rate == 0 or (pace.in_flight == 1 and pace.rate >= LEAST_RATE)


@given(samples, speeds)
def test_over_budget_for_long_reads_at_the_least_rate(
    seen: list[tuple[float | None, float]], moved: float
):
    pace = Pace(BUDGET)
    for one in seen:
        pace.sample(*one)
    for _ in range(100):
        pace.sample(1.0, moved)
    assert pace.rate == LEAST_RATE
    assert not pace.sample(1.0, moved)


@given(samples)
def test_a_guest_that_is_calm_for_long_gets_a_backup_at_full_speed(
    seen: list[tuple[float | None, float]],
):
    pace = Pace(BUDGET)
    for one in seen:
        pace.sample(*one)
    for _ in range(MOST_PATIENCE * (pace.step + 1)):
        pace.sample(None, 1e6)
    assert (pace.step, pace.in_flight, pace.rate) == (0, IN_FLIGHT, 0)


def test_a_sample_after_each_change_only_sees_what_it_did() -> None:
    pace = Pace(BUDGET)
    assert [pace.sample(1.0, 1e8) for _ in range(4)] == [True, False, True, False]


def test_who_speeds_up_too_early_waits_twice_as_long_the_next_time() -> None:
    pace = Pace(BUDGET)
    waits = []
    for _ in range(3):
        while not pace.step:
            pace.sample(1.0, 1e8)
        waited = 0
        while pace.step:
            pace.sample(0.001, 1e8)
            waited += 1
        waits.append(waited)
    assert waits == [5, 10, 20]
