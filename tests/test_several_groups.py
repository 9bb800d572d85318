"""Several groups and all stages: promises hold, nobody starves, and a pass serves one group."""

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.bounds import MARGIN, SHARED
from service.engine.costs import Costs, Machine, Speed
from service.engine.promises import PATIENCE, SHORTEST
from service.engine.scheduler import Scheduler
from service.engine.trials import SHARE
from tests.lines import (
    GROUPS,
    LARGEST,
    ONE,
    SOON,
    Arrival,
    Line,
    Ticket,
    alike,
    any_arrivals,
    any_decode_times,
    any_times,
    cost_tables,
    job_of,
    lines_of,
    machine_of,
    machines,
    play_and_check_promises,
    varied_images,
)
from tests.properties import examples

MANY = 1000
_one_row = st.floats(0.01, 1.0).map(lambda seconds: {1: seconds})


@examples(400)
@given(
    machines(),
    any_arrivals(images=varied_images, latents=True, stages=True),
    any_times,
    any_decode_times,
    st.sampled_from((1, 4, MANY)),
)
def test_every_promise_is_kept_while_all_work_stays_within_its_margin(
    machine: Machine, arrivals: list[Arrival], times: list[float], decode_times: list[float], max_started: int
) -> None:
    line = Line(machine, max_started, times, decode_times=decode_times)
    play_and_check_promises(line, arrivals)


def test_counts_can_be_read_while_the_first_job_of_a_group_arrives() -> None:
    """Metrics read them without a lock."""
    machine = machine_of({1: 1.0}, {1: 2.0})
    scheduler = Scheduler(machine, dict.fromkeys(GROUPS[:2], MANY))
    counts = iter(scheduler.work.forwards.items())
    assert next(counts) == (ONE, 0)
    scheduler.add(job_of(alike(1, 3), machine, group=GROUPS[1]), 100.0)
    assert [*counts] == [(GROUPS[1], 3)]
    assert scheduler.backlog_s == 6.0


# Passes


@examples(80)
@given(
    machines(),
    any_arrivals(images=varied_images, latents=True, stages=True),
    any_times,
    any_decode_times,
    st.sampled_from((1, 4, MANY)),
)
def test_a_pass_serves_one_group_and_counters_agree_with_a_recount(
    machine: Machine, arrivals: list[Arrival], times: list[float], decode_times: list[float], max_started: int
) -> None:
    line = Line(machine, max_started, times, decode_times=decode_times)
    for _ in line.moments(arrivals):
        if line.passes:
            rows = line.passes[-1].rows
            [group] = {ticket.job.group for ticket, _, _ in rows}
            assert 1 <= len(set(rows)) == len(rows) <= machine.passes[group].width
        scheduler, images = line.scheduler, line.images
        running = sum(bool(ticket.ran[index]) for ticket, index in images)
        assert (scheduler.running, scheduler.waiting) == (running, len(images) - running)
        assert scheduler.outstanding == sum(ticket.left for ticket in line.present)
        assert scheduler.runnable == sum(ticket.left for ticket in line.present if not ticket.job.waits)
        for ticket in line.present:
            ahead = [other for other in line.present if other.promise <= ticket.promise]
            if ticket.to_encode:
                assert ticket.job.waits
            elif ticket.job.waits:  # for one ahead, which would have no room for its passes
                assert any(other.to_encode for other in ahead)
        assert scheduler.work.uploads.total() == sum(one < 0 for ticket in line.present for one in ticket.to_encode)
        assert scheduler.work.texts == sum(one >= 0 for ticket in line.present for one in ticket.to_encode)
        assert scheduler.work.images.total() == sum(len(ticket.undecoded) for ticket in line.present)
        assert scheduler.work.unchecked.total() == sum(len(ticket.unchecked) for ticket in line.present)
        assert scheduler.work.pieces == sum(len(ticket.unanswered) for ticket in line.present)
        assert all(0 <= ticket.job.fraction < 1 for ticket in line.present if not ticket.job.is_done)
        if not scheduler.runnable:
            assert scheduler.choose(line.now) == []
    assert not line.present
    assert line.scheduler.backlog_s == pytest.approx(0.0)
    assert list(line.scheduler.by_promise) == list(line.scheduler.by_work) == []
    assert all(ticket.job.fraction == 1 for ticket in line.tickets if ticket.done is not None)


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from((1, 2))), min_size=1, max_size=6), any_times)
def test_in_one_group_the_order_by_seconds_is_the_order_by_forward_rows(
    images: list[tuple[int, int]], times: list[float]
) -> None:
    line = Line(machine_of({1: 0.3, 2: 0.4, 4: 0.7}), times=times)
    for image in images:
        line.came(Arrival(0.0, (image,)))
    lefts = [ticket.left for ticket in line.tickets]
    order = sorted(range(len(lefts)), key=lambda i: (lefts[i], i))
    assert list(line.scheduler.by_work) == [line.tickets[i].job for i in order]


# Nobody starves

SMALL = {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.024}
LARGE = {1: 0.50, 2: 0.90}
FULL = {0: (0.024, 8), 1: (0.90, 2)}  # by group: seconds and width of a full pass


def work_in_line(line: Line, job: Ticket) -> float:
    """Seconds of the work in line with a job that has just come: in full passes, or one job after the other."""
    jobs = [ticket.job for ticket in {*line.present, job} if ticket.job.left]
    alone = sum(one.seconds for one in jobs)
    full = 0.0
    for costs in line.machine.passes.values():
        own = [one for one in jobs if one.costs is costs]
        a_pass = costs.ceilings[costs.width]
        full += a_pass * (sum(one.left for one in own) / costs.width + max((one.steps for one in own), default=0))
    return max(alone, full)


def check_length(line: Line, ticket: Ticket) -> None:
    """A promise is at most twice the work in line, or that of an equal job that came before."""
    equals = [one.promise for one in line.present if one.job.kind == ticket.job.kind and one is not ticket]
    work, busy = work_in_line(line, ticket), max(0.0, line.scheduler.busy_until - line.now)
    assert ticket.promise <= max([line.now + max(SHORTEST, PATIENCE * work + busy), *equals]) + SOON


@examples(100)
@given(
    st.builds(machine_of, cost_tables, cost_tables),
    any_arrivals(images=varied_images, stages=True),
    any_times,
)
def test_a_promise_is_no_longer_than_twice_the_work_in_line(
    machine: Machine, arrivals: list[Arrival], times: list[float]
) -> None:
    arrivals = [replace(arrival, values=None) for arrival in arrivals if lines_of(arrival.images[0])]
    line = Line(machine, times=times)
    seen = 0
    for _ in line.moments(arrivals):
        if len(line.tickets) > seen:
            seen = len(line.tickets)
            if not line.tickets[-1].refused:
                check_length(line, line.tickets[-1])


@pytest.mark.parametrize(("many", "load", "slow"), [(0, 0.9, 1 + MARGIN), (0, 1.5, 1.0), (1, 1.5, 1 + MARGIN)])
def test_an_endless_stream_of_one_group_does_not_starve_the_other(many: int, load: float, slow: float) -> None:
    """Small jobs starve no large one, and large jobs no small one, even if the stream is more than the machine can do.

    The jobs of the stream have less work left than the other one, and go first while there is time to spare.
    """
    one, steps, stream = ((1, 10, 20), (0, 700, 2))[many == 1]
    line = Line(machine_of(SMALL, LARGE), times=[slow])
    seconds, width = FULL[many]
    every = stream * seconds / width / load
    horizon = 40.0 if many == 0 else 300.0
    crowd = [Arrival(i * every, alike(1, stream), group=many, within=horizon / 4) for i in range(int(horizon / every))]
    other = Arrival(horizon / 8, alike(1, steps), group=one)
    ticket: Ticket | None = None
    for _ in line.moments([*crowd, other]):
        if ticket is None and line.tickets and line.tickets[-1].arrival is other:
            ticket = line.tickets[-1]
            check_length(line, ticket)
    assert ticket is not None
    assert ticket.done is not None
    assert ticket.done <= ticket.promise + SOON
    assert ticket.promise < horizon  # while the stream goes on
    accepted = [one for one in line.tickets if not one.refused]
    assert all(one.done is not None and one.done <= one.promise + SOON for one in accepted)
    assert len(accepted) > len(crowd) / 2


# A short job beside large images


@given(st.floats(0.0, 20.0), st.integers(1, 20), st.integers(1, 4))
def test_a_short_job_beside_large_ones_waits_for_one_pass_and_keeps_its_pace(
    at: float, steps: int, images: int
) -> None:
    large = [Arrival(0.0, alike(2, 50), group=1) for _ in range(3)]
    line = Line(machine_of(SMALL, LARGE))
    line.play([*large, Arrival(at, alike(images, steps))])
    short = next(ticket for ticket in line.tickets if ticket.job.group == ONE)
    assert short.seconds <= 0.90 + line.machine.passes[ONE].rounds(images) * steps + SOON
    passes = [ran for ran in line.passes if short in ran.tickets]
    assert len(passes) == steps
    assert all(after.began == before.ended for before, after in pairwise(passes))


@given(st.integers(9, 20), st.integers(1, 20))
def test_with_many_jobs_in_line_a_pass_that_is_not_full_gives_way_to_a_full_one_and_not_twice_in_a_row(
    larger: int, steps: int
) -> None:
    """The other group's pass takes at most four times as long."""
    line = Line(machine_of(SMALL, {1: 0.02, 2: 0.03, 4: 0.04}), promises=False)
    for _ in range(larger):
        line.came(Arrival(0.0, alike(1, 50), group=1))
    short = line.came(Arrival(0.0, alike(1, steps)))
    line.play([])
    gave_way = [short not in ran.tickets for ran in line.passes if ran.began < (short.done or 0.0)]
    assert gave_way == [True, False] * steps
    assert all(len(ran.rows) == 4 for ran in line.passes[: 2 * steps : 2])


def test_a_pass_does_not_give_way_to_a_much_longer_one() -> None:
    line = Line(machine_of(SMALL, LARGE), promises=False)
    for _ in range(20):
        line.came(Arrival(0.0, alike(1, 50), group=1))
    short = line.came(Arrival(0.0, alike(1, 10)))
    line.play([])
    assert short.done == pytest.approx(10 * 0.010)


# Trials


def test_a_width_that_looked_bad_is_tried_where_there_is_time_to_spare_and_work_for_it() -> None:
    truth = {1: 1.0, 8: 2.4}
    line = Line(machine_of({1: 1.0, 8: 8.8}))
    arrivals = [Arrival(0.0, alike(1, 20)) for _ in range(100)]
    run_with(line, arrivals, truth)
    widths = [len(ran.rows) for ran in line.passes]
    assert line.costs.width == 8
    assert widths.index(8) <= 2 + 8.8 / SHARE
    assert all(ticket.done is not None and ticket.done <= ticket.promise for ticket in line.tickets)


def test_a_trial_breaks_no_promise() -> None:
    """All jobs are in a hurry, and the machine takes all of its margin, so no time is to spare."""
    table = {1: 1.0, 8: 8.8}
    line = Line(machine_of(table))
    arrivals = [Arrival(0.0, alike(1, 20), hurry=1.0) for _ in range(100)]
    run_with(line, arrivals, table, 1 + MARGIN)
    assert all(ticket.done is not None and ticket.done <= ticket.promise + SOON for ticket in line.tickets)


def test_there_is_no_trial_where_work_is_short() -> None:
    table = {1: 1.0, 8: 8.8}
    line = Line(machine_of(table))
    run_with(line, [Arrival(0.0, alike(7, 200))], table)
    assert {len(ran.rows) for ran in line.passes} == {1}


def run_with(line: Line, arrivals: list[Arrival], truth: dict[int, float], times: float = 1.0) -> None:
    """Play arrivals on a machine whose passes cost this in truth. Costs follow."""
    for arrival in arrivals:
        line.came(arrival)
    while line.present:
        batch = line.begin()
        seconds = truth[min(width for width in truth if width >= len(batch))] * times
        line.passes[-1] = replace(line.passes[-1], ended=line.now + seconds)
        line.end()
        line.costs.follow(len(batch), seconds)


# Uploads


@pytest.mark.parametrize(("seconds", "waits"), [(10.0, True), (1.5, False)])
@pytest.mark.parametrize("leaves", [inf, 0.5])
def test_a_pass_that_may_be_under_way_when_an_upload_is_encoded_breaks_no_promise(
    seconds: float, waits: bool, leaves: float
) -> None:
    """The large job comes while the upload is encoded. If there is no room for its pass, the pass waits for that."""
    line = Line(machine_of({1: 1.0}, {1: seconds}, encode=1.0), times=[1 + MARGIN], decode_times=[2 * (1 + MARGIN)])
    upload = Arrival(0.0, alike(1, 1), within=6.0, uploads=1, leaves=1.0 + leaves)
    first, second = line.play([upload, Arrival(1.0, alike(1, 1), group=1)])
    assert first.promise == pytest.approx(6.0)
    [began] = (one.began for one in line.passes if one.tickets == [second])
    encoded = line.encoder.batches[0].ended
    assert (began >= min(encoded, first.came + 1.0 + leaves)) == waits
    assert not second.refused
    assert second.done is not None
    assert second.done <= second.promise + SOON
    assert first.cancelled or (first.done or inf) <= first.promise + SOON


def test_a_larger_piece_breaks_no_promise_of_a_job_that_waits_for_no_pass() -> None:
    """The first job's pass lasts long. The second one has no steps, and no time for a check that takes longer."""
    speed = Speed()
    check = {group: Costs({1: seconds}, speed) for group, seconds in zip(GROUPS[:2], (0.5, 1.0), strict=True)}
    passes = {group: Costs({1: 8.0}) for group in GROUPS[:2]}
    line = Line(Machine(passes, text=Costs({1: 0.2}), check=check), decode_times=[SHARED * (1 + MARGIN)])
    no_steps = ((0, 1),)
    tight, larger = Arrival(1.0, no_steps, hurry=1.0, texts=1), Arrival(1.1, no_steps, group=1)
    tickets = line.play([Arrival(0.0, alike(1, 2), checked=False), tight, larger])
    assert tickets[1].promise == pytest.approx(1.0 + 0.5 + 2.5)
    assert all((ticket.done or inf) <= ticket.promise + SOON for ticket in tickets)


def test_images_of_later_jobs_do_not_slow_the_images_of_others_that_are_ahead() -> None:
    """The first job's rows end one by one, and many later images of its size could fill a batch with each of them.

    Then the waiting images of the other size would be late. Short jobs keep the first job's rows apart.
    """
    machine = machine_of({1: 0.5}, {1: 0.5}, {1: 0.5}, decode={1: 1.0})
    machine.decode[GROUPS[1]] = Costs({1: 1.0, 8: 7.2})
    line = Line(machine, times=[1 + MARGIN], decode_times=[SHARED * (1 + MARGIN)])
    no_steps = ((0, 1),)
    long = Arrival(0.0, alike(1, 400), decoded=False, group=2)  # with it in line, other promises are patient
    later = [Arrival(0.0, no_steps, group=1)] * 53
    first = Arrival(0.0, alike(6, 2), within=150.0, group=1)
    waiting = Arrival(38.5, no_steps * 14, within=150.1 - 38.5)
    short = Arrival(0.0, alike(1, 1), decoded=False, group=2)
    times = [0.0] * 59 + [waiting.at + 18.0 * n for n in range(6) for _ in range(26)]
    tickets = line.play([long, *later, first, waiting, *(replace(short, at=at) for at in times)])
    promised = [ticket.promise for ticket in tickets if ticket.arrival in (first, waiting)]
    assert promised == pytest.approx([150.0, 150.1])
    assert all((ticket.done or inf) <= ticket.promise + SOON for ticket in tickets)


def change_speed(machine: Machine, times: float) -> None:
    """All work takes about this many times as long from now on, and that is known."""
    for kind in (machine.passes, machine.decode, machine.encode, machine.check):
        for costs in kind.values():
            for _ in range(20):
                costs.follow(1, times * costs.seconds(1))
    for _ in range(5):
        machine.answer.follow(LARGEST, times * machine.answer.seconds(LARGEST))


@examples(100)
@given(
    machines(tables=_one_row),
    any_arrivals(images=varied_images, latents=True, stages=True),
    any_times,
    any_decode_times,
    st.integers(0, 60),
    st.floats(1.0, 3.0),
)
def test_promises_given_after_the_machine_has_become_slower_are_kept(
    machine: Machine, arrivals: list[Arrival], times: list[float], decode_times: list[float], when: int, speed: float
) -> None:
    """Others seem late then, and have no room for anything. All run to their ends.

    Passes are of one row. So both plans are the same, and the plan that is followed later gave the promise.
    """
    line = Line(machine, times=times, decode_times=decode_times)
    known = 0
    for moment, _ in enumerate(line.moments(arrivals)):
        if moment == when:
            change_speed(machine, speed)
            known = len(line.tickets)
    assert all((ticket.done is not None) + ticket.refused + ticket.cancelled == 1 for ticket in line.tickets)
    assert all(ticket.done <= ticket.promise + SOON for ticket in line.tickets[known:] if ticket.done is not None)


@examples(200)
@given(
    machines(),
    any_arrivals(deadlines=False, images=varied_images, latents=True, stages=True),
    any_times,
    any_decode_times,
    st.booleans(),
    st.integers(0, 60),
    st.floats(0.3, 3.0),
)
def test_without_deadlines_no_job_is_refused(
    machine: Machine,
    arrivals: list[Arrival],
    times: list[float],
    decode_times: list[float],
    follows: bool,
    when: int,
    speed: float,
) -> None:
    """Whatever comes later, and also while costs change. Each ends."""
    line = Line(machine, times=times, follows=follows, decode_times=decode_times)
    for moment, _ in enumerate(line.moments(arrivals)):
        if moment == when:
            change_speed(machine, speed)
    assert all((ticket.done is not None) + ticket.cancelled == 1 for ticket in line.tickets)


@pytest.mark.parametrize(("seconds", "promise"), [(10.0, 2.5 + 12.5 + 1.25), (1.5, 6.0)])
def test_a_promise_has_room_for_a_larger_pass_that_comes_later_if_there_is_time(seconds: float, promise: float) -> None:
    line = Line(machine_of({1: 1.0}, {1: seconds}, encode=1.0))
    first, second = line.play([Arrival(0.0, alike(1, 1), uploads=1), Arrival(1.0, alike(1, 1), group=1)])
    assert first.promise == pytest.approx(promise)
    assert not second.refused


def test_an_upload_beside_a_large_job_is_promised_to_wait_for_one_of_its_passes() -> None:
    line = Line(machine_of({1: 1.0}, {1: 10.0}, encode=1.0), times=[1 + MARGIN], decode_times=[2 * (1 + MARGIN)])
    line.came(Arrival(0.0, alike(1, 5), group=1))
    upload = line.came(Arrival(0.0, alike(1, 1), uploads=1, hurry=1.0))
    assert upload.promise == pytest.approx(2.5 + 12.5 + 1.25)
