"""The work left in a job, and an upper bound on its duration."""

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.costs import Costs
from service.engine.jobs import Job, RowState
from tests.lines import Images, alike, any_images, cost_tables

ROUNDING = 1e-9

# For a few passes, which of the due rows run: row i if bit i is set.
any_passes = st.lists(st.integers(0, 2**24 - 1), max_size=12)


def due(job: Job) -> list[RowState]:
    """The forward rows that could run now."""
    return [row for row in job.behind_first() for _ in range(row.due)]


def run(job: Job, costs: Costs, rows: int) -> None:
    """Run a pass of some of the due rows."""
    chosen = [row for i, row in enumerate(due(job)) if rows >> i & 1]
    if chosen:
        job.count(chosen, costs)


def plan(job: Job, costs: Costs) -> list[RowState]:
    """The next pass of the plan that `seconds` is the duration of."""
    tasks = (row for row in job.furthest_behind() for _ in range(row.due))
    return list(islice(tasks, costs.width))


def partly_run(table: dict[int, float], images: Images, passes: Sequence[int]) -> tuple[Job, Costs]:
    costs = Costs(table)
    job = Job(images, costs)
    for rows in passes:
        run(job, costs, rows)
    return job, costs


def to_the_end(job: Job, costs: Costs) -> Iterator[int]:
    """Run the plan to its end. Yields the number of rows of each pass."""
    while job.left:
        tasks = plan(job, costs)
        job.count(tasks, costs)
        yield len(tasks)


@given(cost_tables, any_images, any_passes)
def test_no_pass_makes_the_seconds_longer(table: dict[int, float], images: Images, passes: list[int]) -> None:
    costs = Costs(table)
    job = Job(images, costs)
    for rows in passes:
        before = job.seconds
        run(job, costs, rows)
        assert job.seconds <= before + ROUNDING


@given(cost_tables, any_images, any_passes)
def test_a_pass_of_the_plan_makes_the_seconds_shorter_by_all_that_it_takes(
    table: dict[int, float], images: Images, passes: list[int]
) -> None:
    job, costs = partly_run(table, images, passes)
    while job.left:
        before, tasks = job.seconds, plan(job, costs)
        job.count(tasks, costs)
        assert job.seconds <= before - costs.ceilings[len(tasks)] + ROUNDING
    assert job.seconds == 0


@given(cost_tables, any_images, any_passes)
def test_the_seconds_are_those_of_the_plan(table: dict[int, float], images: Images, passes: list[int]) -> None:
    job, costs = partly_run(table, images, passes)
    seconds = job.seconds
    assert sum(costs.ceilings[rows] for rows in to_the_end(job, costs)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("images", "seconds"),
    [
        (alike(1, 5), 5 * 1.0),
        (alike(4, 5), 5 * 2.5),
        (alike(9, 5), 5 * (2.5 + 2.5 + 1.0)),  # passes of four, four and one rows
        (alike(2, 5, 2), 5 * 2.5),
        (alike(3, 5, 2), 5 * (2.5 + 1.5)),  # guided rows: a pass with two of them, and a pass with one
        (((5, 1), (2, 1)), 3 * 1.0 + 2 * 1.5),  # the row that is behind, then both
        (((5, 2), (5, 1), (5, 1)), 5 * (2.0 + 1.0)),  # as if every row were guided
    ],
)
def test_images_run_in_groups_that_fill_a_pass(images: Images, seconds: float) -> None:
    assert Job(images, Costs({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5})).seconds == pytest.approx(seconds)


def test_an_image_of_two_rows_takes_two_passes_where_only_one_row_fits() -> None:
    assert Job(alike(1, 5, 2), Costs({1: 1.0})).seconds == pytest.approx(10.0)


@given(cost_tables, any_images, any_passes)
def test_what_is_left_agrees_with_a_recount(table: dict[int, float], images: Images, passes: list[int]) -> None:
    costs = Costs(table)
    job = Job(images, costs)
    ran = [0] * len(images)
    tasks = list(job.rows)
    for rows in passes:
        for row in (row for i, row in enumerate(due(job)) if rows >> i & 1):
            ran[row.index] += 1
        run(job, costs, rows)
        for row, (steps, forwards), n in zip(tasks, images, ran, strict=True):
            assert row.steps_left == steps - n // forwards
            assert list(row.branches) == list(range(n % forwards, forwards))
        assert job.left == job.size - sum(ran) == sum(left for *_, left in job.rest.groups)
        assert sum(together for together, *_ in job.rest.groups) == len([row for row in tasks if row.steps_left])
        assert job.steps == max(row.steps_left for row in tasks)
    assert job.size == sum(steps * forwards for steps, forwards in images)


@given(cost_tables, any_images)
def test_a_group_steps_in_one_pass_and_leaves_no_room_for_another_image(
    table: dict[int, float], images: Images
) -> None:
    costs = Costs(table)
    job = Job(images, costs)
    most = max(forwards for _, forwards in images)
    for _, at_once, _ in job.rest.groups:
        assert at_once <= max(costs.width, most)
    if len(set(images)) == 1:
        assert all(at_once == together * most for together, at_once, _ in job.rest.groups)
        assert all(at_once + most > costs.width for _, at_once, _ in job.rest.groups[:-1])


@given(cost_tables, any_images, any_passes)
def test_images_come_group_after_group_and_those_behind_first(
    table: dict[int, float], images: Images, passes: list[int]
) -> None:
    job, _ = partly_run(table, images, passes)
    tasks = list(job.behind_first())
    assert sorted(row.index for row in tasks) == [row.index for row in job.rows if row.steps_left]
    rest = iter(tasks)
    for together, _, left in job.rest.groups:
        group: list[RowState] = []
        while left:
            group.append(next(rest))
            left -= (group[-1].steps_left - 1) * group[-1].forwards_per_step + group[-1].due
        assert len(group) == together
        steps = [row.steps_left for row in group]
        assert steps == sorted(steps, reverse=True)
    if tasks:
        behind = list(takewhile(lambda row: row.steps_left == tasks[0].steps_left, tasks))
        first = job.furthest_behind()
        assert first
        assert set(first) <= set(behind)


def test_both_branches_of_a_task_may_be_counted_at_once() -> None:
    costs = Costs({4: 1.0})
    job = Job(alike(2, 2, 2), costs)
    [a, b] = job.rows
    job.count([a, a, b], costs)
    assert (a.steps_left, list(a.branches), b.steps_left, list(b.branches)) == (1, [0, 1], 2, [1])
    assert (job.left, job.steps) == (5, 2)


@given(any_images, any_passes, st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_other_costs_weigh_a_job_anew(images: Images, passes: list[int], seconds: list[float]) -> None:
    """Widths may change too. `seconds` stays enough for the plan."""
    job, _ = partly_run({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}, images, passes)
    costs = Costs(dict(enumerate(seconds, 1)))
    job.weigh(costs)
    weighed = job.seconds
    assert sum(costs.ceilings[rows] for rows in to_the_end(job, costs)) == pytest.approx(weighed)


@given(cost_tables, any_images, any_passes, st.booleans())
def test_images_that_are_decoded_are_still_to_be_whatever_has_run(
    table: dict[int, float], images: Images, passes: list[int], decoded: bool
) -> None:
    costs = Costs(table)
    job, plain = Job(images, costs, decoded), Job(images, costs)
    for rows in passes:
        run(job, costs, rows)
        run(plain, costs, rows)
        assert (job.left, job.steps, job.rest.groups) == (plain.left, plain.steps, plain.rest.groups)
        assert job.seconds == plain.seconds
        assert job.undecoded == (len(images) if decoded else 0)
