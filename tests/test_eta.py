"""Estimates of when jobs end, and their accuracy."""

from itertools import pairwise
from math import inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.engine.arrivals import Arrivals
from service.engine.bounds import MARGIN
from service.engine.costs import Machine, PerValue
from service.engine.eta import outlook
from tests.lines import (
    ONE,
    Arrival,
    Images,
    Line,
    Ticket,
    alike,
    any_arrivals,
    any_decode_times,
    any_images,
    any_times,
    cost_tables,
    decoding_machines,
    job_of,
    machine_of,
    machines,
    varied_images,
)
from tests.properties import examples

ONE_ROW = {1: 1.0}
BETWEEN = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}

rising_tables = cost_tables.map(lambda table: dict(zip(table, sorted(table.values()), strict=True)))


def expected(line: Line, ticket: Ticket, arrivals: Arrivals | None = None) -> float:
    known = arrivals or Arrivals(line.now)
    return outlook(ticket.job, line.scheduler, known, line.now, ticket.job.promise).eta()


def crowd(table: dict[int, float], *jobs: Images) -> Line:
    """Jobs that arrived together, without promises."""
    line = Line(machine_of(table), promises=False)
    for images in jobs:
        line.came(Arrival(0.0, images))
    return line


def seen(size: float, every: float, minutes: float = 10.0) -> Arrivals:
    """A steady stream of jobs of one size that ends now, at 0."""
    arrivals = Arrivals(-60 * minutes)
    for i in range(round(60 * minutes / every), 0, -1):
        arrivals.note(size, (0.5 - i) * every)
    return arrivals


@given(rising_tables, st.integers(1, 40), st.integers(1, 12), st.sampled_from((1, 2)))
def test_a_lone_job_takes_its_passes(table: dict[int, float], images: int, steps: int, forwards: int) -> None:
    line = crowd(table, alike(images, steps, forwards))
    assume(line.costs.width % forwards == 0 or line.costs.width == 1)
    [ticket] = line.tickets
    forecast = expected(line, ticket)
    line.play([])
    assert forecast == pytest.approx(ticket.done)


@pytest.mark.parametrize(
    ("images", "seconds"),
    [
        (alike(1, 10), 10.0),
        (alike(4, 10), 25.0),
        (alike(5, 10), 35.0),
        (alike(2, 10, 2), 25.0),
        (alike(3, 10, 2), 40.0),
        (((10, 2), (10, 1)), 20.0),
    ],
)
def test_a_lone_job_in_numbers(images: Images, seconds: float) -> None:
    line = crowd(BETWEEN, images)
    assert expected(line, line.tickets[0]) == pytest.approx(seconds)


def test_jobs_ahead_count_and_jobs_behind_do_not() -> None:
    line = crowd(ONE_ROW, alike(1, 5), alike(1, 3), alike(1, 9), alike(1, 5))
    assert [expected(line, ticket) for ticket in line.tickets] == pytest.approx([8, 3, 22, 13])


def test_jobs_that_share_passes_slow_each_other_down() -> None:
    line = crowd(BETWEEN, alike(1, 8), alike(1, 10))
    assert [expected(line, ticket) for ticket in line.tickets] == pytest.approx([8 * 1.5, 8 * 1.5 + 2 * 1.0])


def test_a_short_job_is_expected_to_keep_its_pace() -> None:
    line = crowd(BETWEEN, alike(1, 5), alike(4, 100))
    assert expected(line, line.tickets[0]) == pytest.approx(5.0)


def test_what_is_left_of_the_present_pass_counts_with_the_margin() -> None:
    line = crowd(ONE_ROW, alike(1, 3))
    line.begin()
    line.now = 0.25
    assert expected(line, line.tickets[0]) == pytest.approx(1 + MARGIN - 0.25 + 2)


def test_a_job_in_its_last_pass_is_done_when_that_ends() -> None:
    line = crowd(ONE_ROW, alike(1, 1), alike(1, 50))
    line.begin()
    line.now = 0.25
    assert expected(line, line.tickets[0]) == pytest.approx(1 + MARGIN - 0.25)


def test_a_job_that_would_be_late_is_expected_at_once() -> None:
    line = Line(machine_of(ONE_ROW))
    ticket = line.came(Arrival(0.0, alike(1, 2), within=3.0))
    assert expected(line, ticket) == pytest.approx(2.0)
    line.now = 1.5
    assert expected(line, ticket) == pytest.approx(1.5)  # the promise is assumed to be kept
    line.now = 10.0
    assert expected(line, ticket) == 0


@examples(40)
@given(cost_tables, any_arrivals(max_size=8), any_times, st.lists(st.integers(1, 200), max_size=10))
def test_no_job_is_expected_after_its_promise(
    table: dict[int, float], arrivals: list[Arrival], times: list[float], sizes: list[int]
) -> None:
    line = Line(machine_of(table), times=times)
    known = Arrivals(0.0)
    for size in sizes:
        known.note(size, 0.0)
    for _ in line.moments(arrivals):
        for ticket in line.present:
            assert 0 <= expected(line, ticket, known) <= ticket.promise - line.now + 1e-9


@given(rising_tables, st.lists(any_images, min_size=1, max_size=8), st.integers(0, 7), st.integers(1, 100))
def test_arrivals_of_shorter_jobs_make_it_longer_and_of_others_do_not(
    table: dict[int, float], jobs: list[Images], which: int, size: int
) -> None:
    line = crowd(table, *jobs)
    ticket, row = line.tickets[which % len(jobs)], line.costs.row
    alone, among = expected(line, ticket), expected(line, ticket, seen(size * row, every=5.0))
    if size >= ticket.size:
        assert among == pytest.approx(alone)
    else:
        assert among >= alone - 1e-9
        if size < 0.4 * ticket.size:
            assert among > alone


def test_overtaking_takes_its_share_of_the_time() -> None:
    """While a job has more work left than new jobs have, it runs half of the time."""
    line = crowd(ONE_ROW, alike(1, 1000))
    assert expected(line, line.tickets[0], seen(1, every=2.0)) == pytest.approx(2000, rel=0.03)


def test_the_nearer_a_job_is_to_its_end_the_fewer_overtake_it() -> None:
    """After half of its steps the job is as short as the new jobs."""
    line = crowd(ONE_ROW, alike(1, 50), alike(1, 100))
    short, long = line.tickets
    stream = seen(64, every=128.0, minutes=600.0)
    assert expected(line, short, stream) == pytest.approx(50)
    assert 150 < expected(line, long, stream) < 250


def test_more_than_there_is_time_for_does_not_take_forever() -> None:
    line = crowd(ONE_ROW, alike(1, 100))
    assert 500 < expected(line, line.tickets[0], seen(1, every=0.1)) <= 1000.1


def test_of_many_jobs_ahead_the_sum_counts() -> None:
    line = crowd(ONE_ROW, *[alike(1, 5)] * 100)
    forecasts = [expected(line, ticket) for ticket in line.tickets]
    assert forecasts == pytest.approx([5.0 * (i + 1) for i in range(100)])


@given(rising_tables, st.lists(any_images, min_size=2, max_size=6))
def test_who_is_ahead_is_expected_first_among_equals(table: dict[int, float], jobs: list[Images]) -> None:
    line = crowd(table, *[jobs[0]] * len(jobs))
    forecasts = [expected(line, ticket) for ticket in line.tickets]
    assert all(a <= b + 1e-6 for a, b in pairwise(forecasts))


@given(st.integers(1, 9), st.lists(st.builds(alike, st.integers(1, 4), st.integers(5, 12)), min_size=1, max_size=8))
def test_where_all_passes_take_as_long_the_forecast_is_near(width: int, jobs: list[Images]) -> None:
    line = crowd({width: 0.5}, *jobs)
    forecasts = [expected(line, ticket) for ticket in line.tickets]
    line.play([])
    for ticket, forecast in zip(line.tickets, forecasts, strict=True):
        assert forecast == pytest.approx(ticket.done, rel=0.25)


def test_asking_changes_nothing() -> None:
    line = crowd(BETWEEN, alike(3, 8), alike(2, 5, 2))
    arrivals = seen(4, every=3.0)
    once = [expected(line, ticket, arrivals) for ticket in line.tickets]
    assert [expected(line, ticket, arrivals) for ticket in line.tickets] == once
    assert all(ticket.job.left == ticket.size for ticket in line.tickets)


def test_a_job_without_promise_has_a_forecast_too() -> None:
    line = crowd(BETWEEN, alike(1, 4))
    assert line.tickets[0].promise == inf
    assert expected(line, line.tickets[0]) == pytest.approx(4.0)


def test_a_job_that_is_to_come_is_expected_as_if_it_were_in_line() -> None:
    line = crowd(ONE_ROW, alike(1, 4))
    to_come = job_of(alike(1, 6), line.machine)
    assert outlook(to_come, line.scheduler, Arrivals(0.0), 0.0, inf).eta() == pytest.approx(10)
    assert outlook(to_come, line.scheduler, Arrivals(0.0), 0.0, promise=9.0).eta() == 9
    line.scheduler.add(to_come, inf)
    assert outlook(to_come, line.scheduler, Arrivals(0.0), 0.0, inf).eta() == pytest.approx(10)


def test_an_estimate_can_be_asked_for_again() -> None:
    line = crowd(BETWEEN, alike(2, 4), alike(1, 9))
    ahead = outlook(line.tickets[1].job, line.scheduler, Arrivals(0.0), 0.0, inf)
    assert ahead.eta() == ahead.eta() > 0


# Decoding


DECODE = {1: 1.0, 4: 2.0}  # seconds of a batch


@given(rising_tables, rising_tables, st.integers(1, 12), st.integers(1, 12))
def test_a_lone_job_takes_its_passes_and_its_decoding(
    table: dict[int, float], decode: dict[int, float], images: int, steps: int
) -> None:
    """Its rows take their steps together, and are decoded when no passes run."""
    machine = machine_of(table, decode=decode)
    assume(images <= machine.passes[ONE].width)
    line = Line(machine, promises=False)
    line.came(Arrival(0.0, alike(images, steps)))
    [ticket] = line.tickets
    forecast = expected(line, ticket)
    line.play([])
    assert forecast == pytest.approx(ticket.done)


@pytest.mark.parametrize(
    ("images", "decoded", "seconds"),
    [
        (alike(1, 10), True, 10.0 + 1.0),
        (alike(1, 10), False, 10.0),
        (alike(4, 10), True, 25.0 + 2.0),
        (alike(5, 10), True, 35.0 + 2.0 + 1.0),  # decoding slows passes down
        (alike(2, 10, 2), True, 25.0 + 2.0),
        (((10, 2), (10, 1)), True, 20.0 + 2.0),
    ],
)
def test_a_lone_job_with_decoding_in_numbers(images: Images, decoded: bool, seconds: float) -> None:
    line = Line(machine_of(BETWEEN, decode=DECODE), promises=False)
    line.came(Arrival(0.0, images, decoded=decoded))
    assert expected(line, line.tickets[0]) == pytest.approx(seconds)


def test_images_that_wait_for_the_decoder_count_and_so_do_those_that_will_before_the_job() -> None:
    line = Line(machine_of(ONE_ROW, decode=DECODE), promises=False)
    for steps in (1, 1, 2):
        line.came(Arrival(0.0, alike(1, steps)))
    for _ in range(2):
        line.begin()
        line.end()
    line.came(Arrival(line.now, alike(1, 4)))
    line.came(Arrival(line.now, alike(1, 3), decoded=False))
    first, second, third, fourth, plain = line.tickets
    waiting = 2.0  # two rows in one batch
    assert [expected(line, ticket) for ticket in (first, second)] == pytest.approx([waiting] * 2)
    assert expected(line, third) == pytest.approx(waiting + 2 + 1)
    assert expected(line, plain) == pytest.approx(waiting + (2 + 1) + 3)
    assert expected(line, fourth) == pytest.approx(waiting + (2 + 1) + 3 + 4 + 1)


def test_a_slower_decoder_is_expected_to_take_longer() -> None:
    line = Line(machine_of(ONE_ROW, decode=DECODE), promises=False)
    line.came(Arrival(0.0, alike(1, 3)))
    for _ in range(60):
        line.machine.decode[ONE].follow(1, 3.0)
    assert expected(line, line.tickets[0]) == pytest.approx(3 + 3.0, rel=0.03)


@examples(40)
@given(decoding_machines(), any_arrivals(max_size=8, latents=True), any_times, any_decode_times)
def test_no_job_is_expected_after_its_promise_where_images_are_decoded(
    machine: Machine, arrivals: list[Arrival], times: list[float], decode_times: list[float]
) -> None:
    line = Line(machine, times=times, decode_times=decode_times)
    for _ in line.moments(arrivals):
        for ticket in line.present:
            assert 0 <= expected(line, ticket) <= ticket.promise - line.now + 1e-6


# Groups and stages


def test_jobs_of_other_groups_ahead_count_and_share_no_pass() -> None:
    line = Line(machine_of(BETWEEN, {1: 4.0, 2: 5.0}), promises=False)
    for group, images in ((0, alike(1, 8)), (1, alike(1, 3)), (0, alike(1, 9)), (1, alike(2, 3))):
        line.came(Arrival(0.0, images, group=group))
    first, large, second, pair = line.tickets  # 8, 12, 9 and 15 seconds of work
    forecasts = [expected(line, ticket) for ticket in (first, second, large, pair)]
    assert forecasts == pytest.approx([8 * 1.5, 8 * 1.5 + 1, 13 + 3 * 5.0, 28 + 4.0 * 1.5], rel=0.1)
    line.play([])
    for ticket, forecast in zip((first, second, large, pair), forecasts, strict=True):
        assert forecast == pytest.approx(ticket.done, rel=0.1)


@given(
    rising_tables,
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 20),
    st.integers(0, 100),
    st.none() | st.floats(0.01, 3.0),
    st.integers(0, 2),
)
def test_a_lone_job_takes_its_texts_its_passes_its_checks_and_its_answer(
    table: dict[int, float], images: int, steps: int, of_image: int, of_whole: int, check: float | None, texts: int
) -> None:
    """Images are checked, and encoded for the answer, beside each other."""
    machine = machine_of(table, answer=PerValue(0.1, 0.05), check=check, text=0.7)
    assume(images <= machine.passes[ONE].width)
    line = Line(machine, promises=False)
    ticket = line.came(Arrival(0.0, alike(images, steps), texts=texts, values=(of_image, of_whole)))
    forecast = expected(line, ticket)
    line.play([])
    assert forecast == pytest.approx(ticket.done)


def test_all_stages_of_a_job_count() -> None:
    machine = machine_of(ONE_ROW, decode=DECODE, encode=3.0, answer=PerValue(0.5, 0.0), text=0.25, check=0.5)
    line = Line(machine, promises=False)
    ticket = line.came(Arrival(0.0, alike(1, 5), texts=2, uploads=1, values=(2, 4)))
    later = line.came(Arrival(0.0, alike(1, 7), texts=1, uploads=1, decoded=False, checked=False))
    encodes = 2 * 3.0 + 3 * 0.25  # of both
    assert expected(line, ticket) == pytest.approx(encodes + 5 + 1 + 0.5 + 1 + 2)
    assert expected(line, later) == pytest.approx(encodes + 5 + 1 + 7)
    line.play([])
    assert ticket.done == pytest.approx(2 * 0.25 + 3.0 + 5 + 1 + 0.5 + 1 + 2)


def test_images_that_wait_for_their_check_count() -> None:
    line = Line(machine_of(ONE_ROW, check=10.0), promises=False)
    first, second = (line.came(Arrival(0.0, alike(1, steps))) for steps in (1, 2))
    assert expected(line, first) == pytest.approx(1 + 10)
    assert expected(line, second) == pytest.approx(1 + 10 + 10)  # its image is finished at 3
    for _ in range(3):
        line.begin()
        line.end()
    assert expected(line, first) == expected(line, second) == pytest.approx(20)


def test_an_answer_that_waits_for_another_is_expected_after_that() -> None:
    line = Line(machine_of(ONE_ROW, answer=PerValue(1.0, 0.0)), promises=False)
    for steps in (1, 2):
        line.came(Arrival(0.0, alike(1, steps), values=(10, 0)))
    first, second = line.tickets
    assert expected(line, first) == pytest.approx(1 + 10)
    assert expected(line, second) == pytest.approx(1 + 10 + 10)  # its image is finished at 3
    line.begin()
    line.end()
    assert expected(line, first) == pytest.approx(10)


def test_a_job_whose_piece_waits_for_a_job_ahead_is_expected_after_it() -> None:
    line = Line(machine_of({1: 0.8}, answer=PerValue(0.4, 0.0)))
    first = line.came(Arrival(0.0, alike(1, 5), within=9.0, values=(1, 0)))
    large = line.came(Arrival(0.0, alike(1, 1), values=(4, 0)))
    assert large.job.behind.answer == first.promise
    forecast = expected(line, large)
    line.play([])
    assert forecast == pytest.approx(large.done)
    assert large.done == pytest.approx(6 * 0.8 + 0.4 + 1.6)


@examples(60)
@given(
    machines(),
    any_arrivals(max_size=8, images=varied_images, latents=True, stages=True),
    any_times,
    any_decode_times,
)
def test_no_job_is_expected_after_its_promise_whatever_its_stages(
    machine: Machine, arrivals: list[Arrival], times: list[float], decode_times: list[float]
) -> None:
    line = Line(machine, times=times, decode_times=decode_times)
    for _ in line.moments(arrivals):
        for ticket in line.present:
            assert 0 <= expected(line, ticket) <= max(0.0, ticket.promise - line.now) + 1e-6
