"""Promises are as early as possible, and each plan keeps its spare time."""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.engine.costs import Costs
from service.engine.jobs import Job, RowState
from service.engine.promises import MARGIN, PATIENCE, SHARED, SHORTEST, Bounds, Spare, earliest, patient, spare
from tests.lines import Images, alike, any_images, cost_tables, costs_with_decoding
from tests.properties import examples

ROUNDING = 1e-7
START = 100.0

BETWEEN = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
EQUAL = {4: 1.0}


@dataclass
class Crowd:
    """Jobs in line with their promises."""

    costs: Costs
    line: list[Job]
    arrived: int = 0

    def add(self, job: Job, promise: float) -> None:
        self.arrived += 1
        job.promise, job.number = promise, self.arrived
        insort(self.line, job, key=lambda one: (one.promise, one.number))


@st.composite
def crowds(draw: st.DrawFn, max_size: int = 6) -> Crowd:
    """Each job has its earliest possible promise, or a later one as requested."""
    crowd = Crowd(Costs(draw(cost_tables)), [])
    for images in draw(st.lists(any_images, max_size=max_size)):
        job = Job(images, crowd.costs)
        wanted = draw(st.sampled_from((0.0, 0.0, START))) + draw(st.floats(0.0, 100.0))
        crowd.add(job, earliest(job, crowd.line, crowd.costs, START, wanted))
    return crowd


@st.composite
def late_crowds(draw: st.DrawFn) -> Crowd:
    """Any promises, also broken ones, as on a machine that has become slower."""
    crowd = Crowd(Costs(draw(cost_tables)), [])
    for images in draw(st.lists(any_images, max_size=6)):
        crowd.add(Job(images, crowd.costs), START + draw(st.floats(-10.0, 100.0)))
    return crowd


def with_promise(crowd: Crowd, job: Job, promise: float) -> list[Job]:
    job.promise, job.number = promise, crowd.arrived + 1
    return sorted([*crowd.line, job], key=lambda one: (one.promise, one.number))


def run(job: Job, tasks: Sequence[RowState], costs: Costs, line: list[Job]) -> None:
    job.count(tasks, costs)
    if not (job.left or job.undecoded):
        line.remove(job)


def fill(line: Sequence[Job], width: int) -> list[RowState]:
    """The rows of a pass, earliest promise first."""
    return list(islice((row for job in line for row in job.behind_first() for _ in range(row.due)), width))


def counted(tasks: Sequence[RowState], crowd: Crowd) -> None:
    for job in dict.fromkeys(row.job for row in tasks):
        run(job, [row for row in tasks if row.job is job], crowd.costs, crowd.line)


# Why promises are kept


@given(crowds())
def test_whoever_is_promised_something_can_have_it(crowd: Crowd) -> None:
    assert max(spare(crowd.line, crowd.costs, START)) >= -ROUNDING


@given(crowds(), any_images, st.floats(0.0, 300.0))
def test_a_promise_leaves_all_others_as_they_were(crowd: Crowd, images: Images, wanted: float) -> None:
    job = Job(images, crowd.costs)
    before = [(one.promise, one.left, one.seconds) for one in crowd.line]
    promise = earliest(job, crowd.line, crowd.costs, START, wanted)
    assert promise >= wanted
    assert [(one.promise, one.left, one.seconds) for one in crowd.line] == before
    assert max(spare(with_promise(crowd, job, promise), crowd.costs, START)) >= -ROUNDING


@given(crowds(), st.integers(0, 2**24 - 1))
def test_nothing_that_runs_leaves_a_plan_less_to_spare_than_the_time_it_takes(crowd: Crowd, rows: int) -> None:
    before = spare(crowd.line, crowd.costs, START)
    due = fill(crowd.line, 24)
    counted([row for i, row in enumerate(due) if rows >> i & 1], crowd)
    after = spare(crowd.line, crowd.costs, START)
    assert after.alone >= before.alone - ROUNDING
    assert after.together >= before.together - ROUNDING


def leave(crowd: Crowd, place: int) -> None:
    """The other jobs have at least as much time to spare as before."""
    assume(place < len(crowd.line))
    before = spare(crowd.line, crowd.costs, START)
    del crowd.line[place]
    after = spare(crowd.line, crowd.costs, START)
    assert after.alone >= before.alone
    assert after.together >= before.together


@given(crowds(), st.integers(0, 5))
def test_a_job_that_leaves_takes_nothing_from_others(crowd: Crowd, place: int) -> None:
    leave(crowd, place)


@given(crowds(), st.integers(0, 2**24 - 1))
def test_the_plan_alone_keeps_what_it_has_to_spare(crowd: Crowd, rows: int) -> None:
    due = fill(crowd.line, 24)
    counted([row for i, row in enumerate(due) if rows >> i & 1], crowd)
    now = START
    while crowd.line:
        before = spare(crowd.line, crowd.costs, now).alone
        tasks = crowd.line[0].furthest_behind()
        tasks = list(islice((row for row in tasks for _ in range(row.due)), crowd.costs.width))
        now += crowd.costs.ceilings[len(tasks)] * (1 + MARGIN)
        counted(tasks, crowd)
        assert spare(crowd.line, crowd.costs, now).alone >= before - ROUNDING


@given(crowds(), st.integers(0, 2**24 - 1))
def test_the_plan_together_keeps_what_it_has_to_spare(crowd: Crowd, rows: int) -> None:
    due = fill(crowd.line, 24)
    counted([row for i, row in enumerate(due) if rows >> i & 1], crowd)
    now = START
    while crowd.line:
        before = spare(crowd.line, crowd.costs, now).together
        tasks = fill(crowd.line, crowd.costs.width)
        now += crowd.costs.ceilings[len(tasks)] * (1 + MARGIN)
        counted(tasks, crowd)
        assert spare(crowd.line, crowd.costs, now).together >= before - ROUNDING


# How early promises are


@examples(200)
@given(crowds(), any_images, st.floats(0.0, 300.0))
def test_no_earlier_promise_could_be_kept(crowd: Crowd, images: Images, wanted: float) -> None:
    """Compares with a search over all places in line, for both plans."""
    costs, bounds = crowd.costs, Bounds(crowd.costs)
    job = Job(images, costs)
    found = earliest(job, crowd.line, costs, START, wanted)
    candidates = {wanted, *(other.promise for other in crowd.line)}
    for place in range(len(crowd.line) + 1):
        ahead = crowd.line[:place]
        candidates.add(START + bounds.alone(job.seconds + sum(other.seconds for other in ahead)))
        candidates.add(START + bounds.together(job.left + sum(other.left for other in ahead), job.steps))
    possible = [
        promise
        for promise in candidates
        if promise >= wanted and max(spare(with_promise(crowd, job, promise), costs, START)) >= -1e-10
    ]
    assert found == pytest.approx(min(possible), abs=ROUNDING)


@given(late_crowds(), any_images, st.floats(0.0, 300.0))
def test_where_promises_are_late_already_a_new_one_is_what_the_better_plan_could_keep(
    crowd: Crowd, images: Images, wanted: float
) -> None:
    costs = crowd.costs
    before = spare(crowd.line, costs, START)
    job = Job(images, costs)
    promise = earliest(job, crowd.line, costs, START, wanted)
    assert wanted <= promise < inf
    line = with_promise(crowd, job, promise)
    after = spare(line, costs, START)
    assert max(after) >= min(max(before), 0) - ROUNDING  # no job becomes later
    upto = line[: line.index(job) + 1]
    alone = promise - START - Bounds(costs).alone(sum(one.seconds for one in upto))
    together = promise - START - Bounds(costs).together(sum(one.left for one in upto), job.steps)
    better = alone if before.alone > before.together else together
    assert better >= -ROUNDING or max(alone, together) >= -ROUNDING


@given(cost_tables, any_images)
def test_an_idle_server_promises_the_sooner_of_both_plans(table: dict[int, float], images: Images) -> None:
    costs = Costs(table)
    job = Job(images, costs)
    bounds = Bounds(costs)
    shortest = min(bounds.alone(job.seconds), bounds.together(job.left, job.steps))
    assert earliest(job, [], costs, START, 0.0) == pytest.approx(START + shortest)
    assert earliest(job, [], costs, START, START + shortest + 1) == START + shortest + 1


def test_a_new_job_goes_ahead_of_those_that_can_wait_and_of_no_other() -> None:
    costs = Costs({1: 0.8})  # a second with the margin
    crowd = Crowd(costs, [])
    for steps, promise in ((5, 106.0), (5, 120.0), (5, 140.0)):
        crowd.add(Job(alike(1, steps), costs), promise)
    for steps, promise in ((1, 101.0), (2, 107.0), (10, 115.0), (11, 121.0), (25, 135.0), (26, 141.0)):
        assert earliest(Job(alike(1, steps), costs), crowd.line, costs, START, 0.0) == pytest.approx(promise)


def test_of_equal_promises_the_first_given_is_the_first_kept() -> None:
    costs = Costs({1: 0.8})
    crowd = Crowd(costs, [])
    crowd.add(Job(alike(1, 5), costs), 105.0)
    assert earliest(Job(alike(1, 1), costs), crowd.line, costs, START, 105.0) == pytest.approx(106.0)


def test_a_job_that_must_wait_for_another_to_its_own_promise_gets_a_later_one() -> None:
    """Ahead of the other job it would take 8 s. But that equals the other's promise, and the older goes first."""
    costs = Costs({4: 0.8})
    crowd = Crowd(costs, [])
    crowd.add(Job(alike(4, 1), costs), 108.0)
    assert earliest(Job(alike(1, 8), costs), crowd.line, costs, START, 0.0) == pytest.approx(109.0)


def test_a_plan_that_has_less_to_spare_may_promise_more() -> None:
    """In the plan `alone`, guided rows leave a third of each pass empty."""
    costs = Costs({1: 0.4, 3: 0.8})
    crowd = Crowd(costs, [])
    crowd.add(Job(alike(1, 10), costs), 1000.0)
    left = spare(crowd.line, costs, START)
    assert left.alone > left.together > 500
    promise = earliest(Job(alike(4, 10, 2), costs), crowd.line, costs, START, 0.0)
    assert promise == pytest.approx(START + 80 / 3 + 10 * 2 / 3)


def test_the_start_is_when_the_next_pass_can_begin() -> None:
    costs = Costs({1: 0.8})
    job = Job(alike(1, 3), costs)
    assert earliest(job, [], costs, 50.0, 0.0) == pytest.approx(53.0)
    assert earliest(job, [], costs, 51.5, 0.0) == pytest.approx(54.5)


# Numbers


def test_bounds_are_seconds_with_the_margin() -> None:
    bounds = Bounds(Costs(BETWEEN))
    assert bounds.alone(8.0) == pytest.approx(8.0 * (1 + MARGIN))
    assert bounds.together(40, 5) == pytest.approx((40 / 4 + 5 * 3 / 4) * 2.5 * (1 + MARGIN))


def test_a_slower_machine_has_longer_bounds() -> None:
    costs = Costs(BETWEEN)
    before = Bounds(costs)
    for _ in range(50):
        costs.follow(4, 5.0)
    after = Bounds(costs)
    assert after.unit == pytest.approx(costs.speed * (1 + MARGIN))
    assert after.alone(1.0) > 1.5 * before.alone(1.0)
    assert after.together(10, 1) > 1.5 * before.together(10, 1)


def test_what_is_to_spare_is_what_the_tightest_promise_leaves() -> None:
    costs = Costs(EQUAL)
    jobs = [Job(alike(4, 4), costs), Job(alike(1, 8), costs)]
    jobs[0].promise, jobs[1].promise = START + 10.0, START + 20.0
    left = spare(jobs, costs, START)
    assert left.alone == pytest.approx(min(10 - 4 * 1.25, 20 - 12 * 1.25))
    assert left.together == pytest.approx(min(10 - (16 / 4 + 4 * 3 / 4) * 1.25, 20 - (24 / 4 + 8 * 3 / 4) * 1.25))
    assert spare(jobs, costs, START + 1.0) == pytest.approx([left.alone - 1, left.together - 1])


def test_nobody_in_line_leaves_all_the_time_to_spare() -> None:
    costs = Costs(EQUAL)
    assert spare([], costs, START) == (inf, inf)
    assert spare([Job(alike(1, 1), costs)], costs, START) == (inf, inf)  # without a promise


@given(cost_tables, any_images, st.integers(0, 10_000))
def test_a_patient_promise_is_a_multiple_of_the_work_ahead(table: dict[int, float], images: Images, ahead: int) -> None:
    costs = Costs(table)
    job = Job(images, costs)
    in_full_passes = Bounds(costs).together(ahead + job.left, job.steps) / (1 + MARGIN)
    assert patient(job, ahead, costs) == pytest.approx(max(SHORTEST, PATIENCE * in_full_passes))


# Decoding


@st.composite
def latent_crowds(draw: st.DrawFn, max_size: int = 6) -> Crowd:
    """Jobs of which some are decoded. Their rows have taken some or all of their steps."""
    crowd = Crowd(draw(costs_with_decoding), [])
    for images, decoded in draw(st.lists(st.tuples(any_images, st.booleans()), max_size=max_size)):
        job = Job(images, crowd.costs, decoded)
        wanted = draw(st.sampled_from((0.0, 0.0, START))) + draw(st.floats(0.0, 100.0))
        crowd.add(job, earliest(job, crowd.line, crowd.costs, START, wanted))
    run_some(crowd, draw(st.lists(st.integers(0, 2**24 - 1), max_size=6)))
    return crowd


def run_some(crowd: Crowd, passes: Sequence[int]) -> None:
    """Run passes of some of the due rows, earliest promise first."""
    for rows in passes:
        due = fill(crowd.line, 24)
        counted([row for i, row in enumerate(due) if rows >> i & 1], crowd)


def decode(crowd: Crowd, most: int) -> None:
    """Decode rows that have taken their steps, earliest promise first."""
    for job in list(crowd.line):
        if job.undecoded:
            unfinished = sum(row.steps_left > 0 for row in job.rows)
            images = min(most, job.undecoded - unfinished)
            job.undecoded -= images
            most -= images
            if not (job.left or job.undecoded):
                crowd.line.remove(job)


def to_spare(line: Sequence[Job], costs: Costs, start: float) -> Spare:
    """The spare time of plans and decoder, with a separate sum for each job, even one that waits only for decoding."""
    bounds = Bounds(costs)
    alone, together = [inf], [inf]
    for place, job in enumerate(line, 1):
        upto = line[:place]
        images = bounds.decoded(job, sum(other.undecoded for other in upto))
        steps_alone = bounds.alone(sum(other.seconds for other in upto))
        steps_together = bounds.together(sum(other.left for other in upto), job.steps)
        alone.append(job.promise - start - images - (steps_alone if job.left else 0.0))
        together.append(job.promise - start - images - (steps_together if job.left else 0.0))
    return Spare(min(alone), min(together))


@given(latent_crowds(), any_images, st.booleans(), st.floats(0.0, 300.0))
def test_a_promise_breaks_none_where_images_are_decoded(
    crowd: Crowd, images: Images, decoded: bool, wanted: float
) -> None:
    assert max(to_spare(crowd.line, crowd.costs, START)) >= -ROUNDING
    job = Job(images, crowd.costs, decoded)
    promise = earliest(job, crowd.line, crowd.costs, START, wanted)
    assert promise >= wanted
    assert max(to_spare(with_promise(crowd, job, promise), crowd.costs, START)) >= -ROUNDING


@given(latent_crowds())
def test_passes_have_to_spare_what_is_not_needed_for_steps_and_decoding(crowd: Crowd) -> None:
    """For a job that only waits for decoding, all of its time is spare."""
    left = spare(crowd.line, crowd.costs, START)
    for job in crowd.line:
        if not job.left:
            job.promise = inf
    assert left == pytest.approx(to_spare(crowd.line, crowd.costs, START))


@given(latent_crowds(), st.integers(0, 2**24 - 1), st.integers(0, 24))
def test_nothing_that_runs_or_is_decoded_leaves_a_plan_less_to_spare(crowd: Crowd, rows: int, images: int) -> None:
    left = [spare(crowd.line, crowd.costs, START)]
    run_some(crowd, [rows])
    left.append(spare(crowd.line, crowd.costs, START))
    decode(crowd, images)
    left.append(spare(crowd.line, crowd.costs, START))
    for before, after in pairwise(left):
        assert after.alone >= before.alone - ROUNDING
        assert after.together >= before.together - ROUNDING


@given(latent_crowds(), st.integers(0, 5))
def test_a_job_that_leaves_takes_nothing_from_others_where_images_are_decoded(crowd: Crowd, place: int) -> None:
    leave(crowd, place)


@given(latent_crowds(), st.sampled_from(("alone", "together")))
def test_either_plan_keeps_what_it_has_to_spare_where_images_are_decoded(crowd: Crowd, plan: str) -> None:
    """Even if the decoder has not begun."""
    now, costs = START, crowd.costs
    while with_steps := [job for job in crowd.line if job.left]:
        before = getattr(spare(crowd.line, costs, now), plan)
        if plan == "together":
            tasks = fill(crowd.line, costs.width)
        else:
            behind = with_steps[0].furthest_behind()
            tasks = list(islice((row for row in behind for _ in range(row.due)), costs.width))
        now += costs.ceilings[len(tasks)] * (1 + MARGIN)
        counted(tasks, crowd)
        assert getattr(spare(crowd.line, costs, now), plan) >= before - ROUNDING


@examples(200)
@given(latent_crowds(), any_images, st.booleans(), st.floats(0.0, 300.0))
def test_no_earlier_promise_could_be_kept_where_images_are_decoded(
    crowd: Crowd, images: Images, decoded: bool, wanted: float
) -> None:
    """Compares with a search over all places in line, for both plans."""
    costs, bounds = crowd.costs, Bounds(crowd.costs)
    job = Job(images, costs, decoded)
    found = earliest(job, crowd.line, costs, START, wanted)
    candidates = {wanted, *(other.promise for other in crowd.line)}
    for place in range(len(crowd.line) + 1):
        upto = [job, *crowd.line[:place]]
        stepped = START + bounds.decoded(job, sum(other.undecoded for other in upto))
        candidates.add(stepped + bounds.alone(sum(other.seconds for other in upto)))
        candidates.add(stepped + bounds.together(sum(other.left for other in upto), job.steps))
    possible = [
        promise
        for promise in candidates
        if promise >= wanted and max(to_spare(with_promise(crowd, job, promise), costs, START)) >= -1e-10
    ]
    assert found == pytest.approx(min(possible), abs=ROUNDING)


def test_bounds_of_decoding_are_seconds_beside_passes_with_the_margin() -> None:
    costs = Costs(EQUAL, Costs({1: 1.0, 4: 2.0}))
    decoded, plain = Job(alike(1, 1), costs, decoded=True), Job(alike(1, 1), costs)
    a_batch = 2.0 * SHARED * (1 + MARGIN)
    assert Bounds(costs).decoded(decoded, 6) == pytest.approx((6 / 4 + 2 - 1 / 4) * a_batch)
    assert Bounds(costs).decoded(plain, 6) == 0
    assert costs.decoding is not None
    for _ in range(50):
        costs.decoding.follow(4, 4.0)
    assert Bounds(costs).decoded(decoded, 6) > 1.5 * (6 / 4 + 2 - 1 / 4) * a_batch


@given(costs_with_decoding, any_images, st.integers(0, 10_000), st.integers(0, 100))
def test_a_patient_promise_allows_for_decoding_too(costs: Costs, images: Images, ahead: int, images_ahead: int) -> None:
    job, bounds = Job(images, costs, decoded=True), Bounds(costs)
    work = bounds.together(ahead + job.left, job.steps) + bounds.decoded(job, images_ahead + len(images))
    assert patient(job, ahead, costs, images_ahead) == pytest.approx(max(SHORTEST, PATIENCE * work / (1 + MARGIN)))
    assert patient(Job(images, costs), ahead, costs, images_ahead) == patient(Job(images, costs), ahead, costs)
