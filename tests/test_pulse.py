"""What passes say of the model, and when one has gone on for too long."""

import pytest

from service.pulse import Pulse
from tests.engines import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pulse(clock: FakeClock) -> Pulse:
    return Pulse(clock)


@pytest.mark.parametrize(("expected_s", "limit"), [(0.001, 30.0), (1.5, 30.0), (2.0, 40.0), (60.0, 1200.0)])
def test_a_pass_is_stuck_after_thirty_seconds_and_twenty_times_what_it_should_take(
    pulse: Pulse, clock: FakeClock, expected_s: float, limit: float
) -> None:
    for _ in range(2):
        clock.now += 10_000  # without a pass nothing is stuck
        assert pulse.stuck_s == 0
        pulse.pass_begins(expected_s)
        clock.now += limit - 0.5
        assert pulse.stuck_s == 0
        clock.now += 0.5
        assert pulse.stuck_s == limit
        clock.now += 1
        assert pulse.stuck_s == limit + 1
        pulse.pass_ended(worked=False)
        assert pulse.stuck_s == 0


def test_three_passes_in_a_row_that_raise_are_failing_until_one_works(pulse: Pulse) -> None:
    for _ in range(2):
        for failing in (False, False, True, True):
            pulse.pass_ended(worked=False)
            assert pulse.failing == failing
        pulse.pass_ended(worked=True)
        assert not pulse.failing


def test_what_failed_is_in_doubt_until_an_image_is_finite(pulse: Pulse) -> None:
    assert not pulse.in_doubt
    pulse.pass_ended(worked=False)
    assert pulse.in_doubt
    pulse.pass_ended(worked=True)
    assert pulse.in_doubt
    pulse.image_ended(finite=True)
    assert not pulse.in_doubt
    pulse.image_ended(finite=False)
    assert pulse.in_doubt
    pulse.pass_ended(worked=True)
    assert pulse.in_doubt
    pulse.image_ended(finite=True)
    assert not pulse.in_doubt


def test_what_failed_last_has_failed_until_an_image_is_finite_however_long_ago(pulse: Pulse, clock: FakeClock) -> None:
    assert not pulse.failed
    clock.now += 100
    assert pulse.in_doubt
    assert not pulse.failed
    pulse.pass_ended(worked=False)
    pulse.pass_ended(worked=True)
    assert pulse.failed
    pulse.image_ended(finite=True)
    assert not pulse.failed
    pulse.image_ended(finite=False)
    assert pulse.failed


def test_ten_seconds_without_a_pass_that_worked_are_a_doubt(pulse: Pulse, clock: FakeClock) -> None:
    for _ in range(2):
        clock.now += 10
        assert not pulse.in_doubt
        clock.now += 0.5
        assert pulse.in_doubt
        pulse.image_ended(finite=True)
        assert pulse.in_doubt
        pulse.pass_ended(worked=True)
        assert not pulse.in_doubt
