"""The health of a thread that calls the model: whether it makes progress, and whether the model works."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.stage_health import StageHealth
from tests.engines import GROUP, OTHER, FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pulse(clock: FakeClock) -> StageHealth:
    return StageHealth(clock)


@pytest.mark.parametrize(("expected_s", "given_s"), [(0.001, 8.0), (0.5, 8.0), (1.0, 16.0), (4.0, 64.0), (12.0, 192.0)])
def test_a_call_of_sixteen_times_its_time_is_overdue_and_counts_as_half_a_second_at_least(
    pulse: StageHealth, clock: FakeClock, expected_s: float, given_s: float
) -> None:
    for _ in range(2):
        clock.now += 10_000  # an idle thread is never overdue
        assert pulse.overdue is None
        pulse.beat(expected_s)
        clock.now += given_s - 0.5
        assert pulse.overdue is None
        clock.now += 0.5
        assert pulse.overdue == (given_s, given_s)
        clock.now += 1
        assert pulse.overdue == (given_s + 1, given_s)
        pulse.beat(expected_s)  # the next call begins
        assert pulse.overdue is None
        pulse.rest()


@given(st.floats(0.5, 1e4))
def test_a_hang_is_found_within_twenty_times_the_expected_time(expected_s: float) -> None:
    """With a check every second."""
    clock = FakeClock()
    pulse = StageHealth(clock)
    pulse.beat(expected_s)
    clock.now += 20 * expected_s - 1
    assert pulse.overdue is not None


def test_rest_counts_from_when_work_ended(pulse: StageHealth, clock: FakeClock) -> None:
    clock.now += 5
    assert pulse.rest_s == 5
    pulse.rest()
    assert pulse.rest_s == 5
    pulse.beat(1.0)
    clock.now += 7
    assert pulse.rest_s == 0
    pulse.rest()
    clock.now += 3
    pulse.rest()
    assert pulse.rest_s == 3


def test_failures_are_a_suspicion_until_an_image_is_finite(pulse: StageHealth) -> None:
    failures: list[Callable[[], None]] = [
        partial(pulse.call_ended, GROUP, worked=False),
        partial(pulse.raised, GROUP),
        partial(pulse.made, GROUP, finite=False),
    ]
    for fail in failures:
        assert not pulse.suspected
        for _ in range(100):
            fail()
        assert pulse.suspected == {GROUP}
        assert not pulse.broken  # the requests may be the cause
        assert not pulse.hopeless
        pulse.call_ended(GROUP, worked=True)
        assert pulse.suspected
        pulse.made(GROUP, finite=True)


def test_a_probe_that_fails_shows_that_the_model_is_broken_until_an_image_is_finite(pulse: StageHealth) -> None:
    pulse.probe_failed(GROUP)
    assert pulse.broken
    pulse.call_ended(GROUP, worked=True)
    pulse.made(GROUP, finite=False)
    assert pulse.broken
    pulse.made(GROUP, finite=True)
    assert not pulse.broken


@pytest.mark.parametrize("fault", ["the pass raises", "the image is not finite"])
def test_five_probes_in_a_row_that_fail_leave_no_hope(pulse: StageHealth, fault: str) -> None:
    for _ in range(5):
        assert not pulse.hopeless
        pulse.call_ended(GROUP, worked=fault != "the pass raises")
        pulse.probe_failed(GROUP)
    assert pulse.hopeless
    pulse.made(GROUP, finite=True)
    assert not pulse.hopeless


def test_a_pass_that_works_between_probes_whose_passes_raise_leaves_hope(pulse: StageHealth) -> None:
    for _ in range(5):
        for _ in range(4):
            pulse.call_ended(GROUP, worked=False)
            pulse.probe_failed(GROUP)
        pulse.call_ended(GROUP, worked=True)  # of a long request
    assert pulse.broken
    assert not pulse.hopeless


def test_an_image_of_one_group_tells_nothing_of_another(pulse: StageHealth) -> None:
    for group in (GROUP, OTHER):
        pulse.call_ended(group, worked=False)
    pulse.made(OTHER, finite=True)
    assert pulse.suspected == {GROUP}
    for _ in range(5):
        assert not pulse.hopeless
        pulse.probe_failed(GROUP)
        pulse.made(OTHER, finite=True)
        assert pulse.broken
    assert pulse.hopeless
    pulse.made(GROUP, finite=True)
    assert (pulse.suspected, pulse.broken, pulse.hopeless) == (set(), False, False)


Told = tuple[Literal["pass", "image", "rest", "wait"], float]


@given(
    st.floats(1e-3, 60.0),
    st.lists(st.tuples(st.sampled_from(("pass", "image", "rest", "wait")), st.floats(0, 1)), max_size=50),
)
def test_work_that_ends_in_time_is_never_a_failure_however_slow_it_is(expected_s: float, script: list[Told]) -> None:
    """Calls come in any order, with rests of any length."""
    clock = FakeClock()
    pulse = StageHealth(clock)
    for what, share in script:
        if what == "pass":
            pulse.beat(expected_s)
            clock.now += share * 15.9 * expected_s
            assert pulse.overdue is None
            assert pulse.rest_s == 0  # the running call keeps it out of doubt
            pulse.call_ended(GROUP, worked=True)
            pulse.beat(expected_s)
        elif what == "image":
            pulse.made(GROUP, finite=True)
        else:
            pulse.rest()
            clock.now += share * 1e6 if what == "wait" else 0.0
        assert pulse.overdue is None
        assert (pulse.suspected, pulse.broken, pulse.hopeless) == (set(), False, False)
