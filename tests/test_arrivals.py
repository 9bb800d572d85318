"""The recent rate of arriving work."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.arrivals import Arrivals

MINUTE = 60.0
ANY = 10.0**6  # seconds; all jobs are smaller

sizes = st.integers(1, 5000)


def after(seconds: float, size: float, every: float = 0.5) -> Arrivals:
    """A steady stream of jobs of one size."""
    arrivals = Arrivals(0.0)
    for i in range(round(seconds / every)):
        arrivals.note(size, (i + 0.5) * every)
    return arrivals


@pytest.mark.parametrize("seconds", [10.0, 30.0, 60.0, 600.0])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_steady_stream_has_its_rate_from_early_on(seconds: float, size: int) -> None:
    assert after(seconds, size).rates(seconds)(ANY) == pytest.approx(2 * size, rel=0.02)


@given(sizes, st.floats(0.0, 10.0))
def test_a_first_job_is_not_yet_a_stream(size: int, now: float) -> None:
    arrivals = Arrivals(0.0)
    arrivals.note(size, now)
    assert arrivals.rates(now)(ANY) <= size / 9


def test_nothing_seen_is_no_rate() -> None:
    assert Arrivals(5.0).rates(5.0)(ANY) == 0
    assert Arrivals(5.0).rates(1000.0)(ANY) == 0


def test_a_stream_that_has_ended_is_forgotten_slowly() -> None:
    arrivals = after(600.0, 10)
    rates = [arrivals.rates(600.0 + minutes * MINUTE)(ANY) for minutes in range(10)]
    assert rates == pytest.approx([20 * math.exp(-minutes) for minutes in range(10)], rel=0.02)


def test_a_stream_that_becomes_another_has_the_new_rate_after_a_while() -> None:
    arrivals = after(600.0, 10)
    for i in range(600):
        arrivals.note(10, 600.0 + 0.5 * (i + 0.5) * 2)
    assert arrivals.rates(1200.0)(ANY) == pytest.approx(10, rel=0.02)


@given(st.lists(sizes, max_size=20), sizes)
def test_only_smaller_jobs_count(jobs: list[int], below: int) -> None:
    arrivals = Arrivals(0.0)
    for size in jobs:
        arrivals.note(size, 100.0)
    window = MINUTE * (1 - math.exp(-100 / MINUTE))
    smaller = arrivals.rates(100.0)(below) * window
    assert smaller <= sum(size for size in jobs if size < below) + 1e-6
    assert smaller >= sum(size for size in jobs if size < below * 8 / 9) - 1e-6  # sizes this near may count as equal


@pytest.mark.parametrize(("size", "below"), [(1, 1.5), (15, 16.0), (16, 18.0), (64, 72.0), (1024, 1152.0)])
def test_a_job_that_is_hardly_smaller_counts(size: float, below: float) -> None:
    arrivals = after(60.0, size)
    assert arrivals.rates(60.0)(below) == arrivals.rates(60.0)(ANY) > 0


@given(st.lists(sizes, max_size=20), st.floats(1.0, 5000.0), st.floats(1.0, 5000.0))
def test_the_rate_never_falls_with_the_size(jobs: list[int], a: float, b: float) -> None:
    arrivals = Arrivals(0.0)
    for i, size in enumerate(jobs):
        arrivals.note(size, float(i))
    low, high = sorted((a, b))
    assert arrivals.rates(30.0)(low) <= arrivals.rates(30.0)(high)


@given(st.lists(st.tuples(sizes, st.floats(0.0, 100.0)), max_size=20), st.floats(100.0, 200.0))
def test_streams_add_up(jobs: list[tuple[int, float]], now: float) -> None:
    jobs.sort(key=lambda job: job[1])
    together, apart = Arrivals(0.0), [Arrivals(0.0), Arrivals(0.0)]
    for i, (size, at) in enumerate(jobs):
        together.note(size, at)
        apart[i % 2].note(size, at)
    assert together.rates(now)(ANY) == pytest.approx(sum(arrivals.rates(now)(ANY) for arrivals in apart))


def test_asking_changes_nothing() -> None:
    asked, other = after(30.0, 7), after(30.0, 7)
    for now in (30.0, 40.0, 300.0):
        asked.rates(now)(5)
        asked.rates(now)(ANY)
    asked.note(3, 300.0)
    other.note(3, 300.0)
    assert asked.rates(310.0)(ANY) == other.rates(310.0)(ANY)
