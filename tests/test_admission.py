"""Admission: one function that promises or refuses, and changes nothing."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.admission import REFUSALS, Line, admit, earliest_promise
from service.engine.arrivals import Arrivals
from service.engine.bounds import MARGIN
from service.engine.costs import Machine, PerValue
from service.engine.fairness import Places
from service.engine.promises import seconds_alone
from service.engine.scheduler import Scheduler
from service.engine.stage_work import StageWork
from service.errors import Invalid, QueueFull, ServiceError, ShareTaken, TooLate
from tests.lines import ONE, Images, alike, any_images, cost_tables, job_of, machine_of

ALICE = "alice"


def a_line(machine: Machine, *jobs: Images, places: int = 16) -> Line:
    """Jobs that arrived at 0, each with a promise."""
    line = Line(Scheduler(machine, {ONE: 64}), Places(places), Arrivals(0.0))
    for images in jobs:
        job = job_of(images, machine)
        line.scheduler.add(job, admit(job, ALICE, line, 0.0, inf).promise)
        line.places.take(ALICE)
    return line


def state(line: Line) -> object:
    scheduler = line.scheduler
    return (
        list(scheduler.by_work),
        list(scheduler.by_promise),
        (scheduler.running, scheduler.waiting, scheduler.outstanding, scheduler.busy_until),
        line.places.taken,
    )


@given(cost_tables, st.lists(any_images, max_size=6), any_images, st.floats(0.01, 100.0))
def test_an_accepted_job_is_expected_before_its_promise_and_that_within_its_time(
    table: dict[int, float], others: list[Images], images: Images, timeout_s: float
) -> None:
    machine = machine_of(table)
    line = a_line(machine, *others)
    before, job = state(line), job_of(images, machine)
    try:
        admission = admit(job, ALICE, line, 1.0, timeout_s)
    except (TooLate, Invalid):
        assert earliest_promise(job, line.scheduler, 1.0, 1.0 + timeout_s) > 1.0 + timeout_s
    else:
        assert 1.0 < admission.promise <= 1.0 + timeout_s
        assert 0 <= admission.outlook.eta() <= admission.promise - 1.0
        assert 0 <= admission.position <= len(others)
    assert state(line) == before


def test_a_job_that_takes_too_long_alone_is_refused_for_good() -> None:
    line = a_line(machine_of({1: 1.0}))
    job = job_of(alike(1, 10), line.scheduler.machine)
    alone_s = seconds_alone(job, line.scheduler.machine)
    assert alone_s == 10 * (1 + MARGIN)
    with pytest.raises(Invalid, match=r"timeout_s: must be at least 12\.5 for this"):
        admit(job, ALICE, line, 0.0, 12.4)


def test_a_job_that_takes_too_long_only_now_is_told_when_to_come_again() -> None:
    line = a_line(machine_of({1: 1.0}))
    hurried = job_of(alike(1, 10), line.scheduler.machine)
    line.scheduler.add(hurried, admit(hurried, ALICE, line, 0.0, 12.5).promise)  # no time to spare
    with pytest.raises(TooLate) as late:
        admit(job_of(alike(1, 1), line.scheduler.machine), ALICE, line, 0.0, 1.3)
    assert not late.value.even_alone
    assert late.value.retry_after > 0


def test_a_job_that_a_slower_machine_cannot_do_may_come_again() -> None:
    machine = machine_of({1: 1.0})
    line = a_line(machine)
    for _ in range(100):
        machine.passes[ONE].follow(1, 2.0)
    with pytest.raises(TooLate, match="the machine is slower than it was") as late:
        admit(job_of(alike(1, 10), machine), ALICE, line, 0.0, 15.0)
    assert late.value.even_alone


def test_who_holds_the_queue_is_refused_and_others_are_not() -> None:
    line = a_line(machine_of({1: 1.0}), alike(1, 1), alike(1, 1), places=2)
    job = job_of(alike(1, 1), line.scheduler.machine)
    with pytest.raises(QueueFull):
        admit(job, ALICE, line, 0.0, inf)
    assert admit(job, "bob", line, 0.0, inf).position == 2
    line.places.take("bob")
    with pytest.raises(ShareTaken):
        admit(job, ALICE, line, 0.0, inf)


def test_nobody_is_refused_because_a_part_is_larger_than_others_have_room_for() -> None:
    """The machine has become slower, so the first job has nothing to spare. A sheet of two images comes."""
    machine = machine_of({1: 0.01}, answer=PerValue(30e-9, 1e-3, largest=1024))
    line = a_line(machine)
    first = job_of(alike(1, 1000), machine, StageWork(values=(1024, 0)))
    line.scheduler.add(first, admit(first, ALICE, line, 0.0, 300.0).promise)
    for _ in range(100):
        machine.passes[ONE].follow(1, 0.05)
    sheet = job_of(alike(2, 2), machine, StageWork(values=(0, 2048)))
    assert admit(sheet, ALICE, line, 1.0, 300.0).promise < 100.0
    done = 1.0 + 1000 * 0.05 * (1 + MARGIN)  # the first one
    assert done > first.promise + 10.0
    assert sheet.behind.answer == first.promise
    assert sheet.done_by == pytest.approx(done, rel=0.05)


def test_a_part_that_others_have_no_room_for_is_late_only_by_their_time() -> None:
    machine = machine_of({1: 1.0}, answer=PerValue(1.0, 0.0))
    line = a_line(machine)
    first = job_of(alike(1, 1), machine, StageWork(values=(1, 0)))
    line.scheduler.add(first, admit(first, ALICE, line, 0.0, 10.0).promise)
    large = job_of(((0, 1),), machine, StageWork(values=(10, 0)))
    with pytest.raises(TooLate, match=r"this cannot be done within 56 s now, but within 56\.2 s"):
        admit(large, ALICE, line, 0.0, 56.0)
    # The first one's promise, the work, and a piece like its own that may be under way
    assert admit(large, ALICE, line, 0.0, 56.5).promise == pytest.approx(6.25 + 25.0 + 25.0)


def descendants(kind: type[ServiceError]) -> set[type[ServiceError]]:
    return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))


def test_each_refusal_has_a_reason_of_its_own() -> None:
    assert len(set(REFUSALS.values())) == len(REFUSALS)
    assert REFUSALS.keys() <= descendants(ServiceError)
