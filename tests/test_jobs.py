"""The work left in a job, and an upper bound on its duration."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.costs import Machine, PerValue
from service.engine.jobs import Job
from service.engine.stage_work import StageWork
from service.engine.waves import RowState
from tests.lines import (
    Images,
    alike,
    any_images,
    cost_tables,
    job_of,
    lines_of,
    machine_of,
    machines,
    varied_images,
)

ROUNDING = 1e-9

# For a few passes, which of the due rows run: row i if bit i is set.
any_passes = st.lists(st.integers(0, 2**24 - 1), max_size=12)


def due(job: Job) -> list[RowState]:
    """The forward rows that could run now."""
    return [row for row in job.behind_first() for _ in range(row.due)]


def run(job: Job, rows: int) -> None:
    """Run a pass of some of the due rows."""
    chosen = [row for i, row in enumerate(due(job)) if rows >> i & 1]
    if chosen:
        job.count(chosen)


def plan(job: Job) -> list[RowState]:
    """The next pass of the plan that `seconds` is the duration of."""
    tasks = (row for row in job.furthest_behind() for _ in range(row.due))
    return list(islice(tasks, job.costs.width))


def partly_run(table: dict[int, float], images: Images, passes: Sequence[int]) -> Job:
    job = job_of(images, machine_of(table))
    for rows in passes:
        run(job, rows)
    return job


def to_the_end(job: Job) -> Iterator[int]:
    """Run the plan to its end. Yields the number of rows of each pass."""
    while job.left:
        tasks = plan(job)
        job.count(tasks)
        yield len(tasks)


@given(cost_tables, varied_images, any_passes)
def test_no_pass_makes_the_seconds_longer(table: dict[int, float], images: Images, passes: list[int]) -> None:
    job = job_of(images, machine_of(table))
    for rows in passes:
        before = job.seconds
        run(job, rows)
        assert job.seconds <= before + ROUNDING


@given(cost_tables, varied_images, any_passes)
def test_a_pass_of_the_plan_makes_the_seconds_shorter_by_all_that_it_takes(
    table: dict[int, float], images: Images, passes: list[int]
) -> None:
    job = partly_run(table, images, passes)
    while job.left:
        before, tasks = job.seconds, plan(job)
        job.count(tasks)
        assert job.seconds <= before - job.costs.ceilings[len(tasks)] + ROUNDING
    assert job.seconds == 0


@given(cost_tables, varied_images, any_passes)
def test_the_seconds_are_those_of_the_plan(table: dict[int, float], images: Images, passes: list[int]) -> None:
    job = partly_run(table, images, passes)
    seconds = job.seconds
    assert sum(job.costs.ceilings[rows] for rows in to_the_end(job)) == pytest.approx(seconds)


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
def test_images_run_in_waves_that_fill_a_pass(images: Images, seconds: float) -> None:
    assert job_of(images, machine_of({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5})).seconds == pytest.approx(seconds)


def test_an_image_of_two_rows_takes_two_passes_where_only_one_row_fits() -> None:
    assert job_of(alike(1, 5, 2), machine_of({1: 1.0})).seconds == pytest.approx(10.0)


@given(cost_tables, varied_images, any_passes)
def test_what_is_left_agrees_with_a_recount(table: dict[int, float], images: Images, passes: list[int]) -> None:
    job = job_of(images, machine_of(table))
    tables = [lines_of(image) for image in images]
    ran = [0] * len(images)
    tasks = list(job.rows)
    for rows in passes:
        for row in (row for i, row in enumerate(due(job)) if rows >> i & 1):
            ran[row.index] += 1
        run(job, rows)
        for row, table_, n in zip(tasks, tables, ran, strict=True):
            ends = list(accumulate(table_))
            taken = bisect_right(ends, n)
            assert row.steps_left == len(table_) - taken
            if row.steps_left:
                first = n - (ends[taken - 1] if taken else 0)
                assert list(row.branches) == list(range(first, table_[taken]))
        assert job.left == job.size - sum(ran) == sum(left for *_, left in job.rest.waves)
        assert sum(together for together, *_ in job.rest.waves) == len([row for row in tasks if row.steps_left])
        assert job.steps == max(row.steps_left for row in tasks)
    assert job.size == sum(map(sum, tables))


@given(cost_tables, any_images)
def test_a_wave_steps_in_one_pass_and_leaves_no_room_for_another_image(table: dict[int, float], images: Images) -> None:
    job = job_of(images, machine_of(table))
    most = max(forwards for _, forwards in images)
    for _, at_once, _ in job.rest.waves:
        assert at_once <= max(job.costs.width, most)
    if len(set(images)) == 1:
        assert all(at_once == together * most for together, at_once, _ in job.rest.waves)
        assert all(at_once + most > job.costs.width for _, at_once, _ in job.rest.waves[:-1])


@given(cost_tables, varied_images, any_passes)
def test_images_come_wave_after_wave_and_those_behind_first(
    table: dict[int, float], images: Images, passes: list[int]
) -> None:
    job = partly_run(table, images, passes)
    tasks = list(job.behind_first())
    assert sorted(row.index for row in tasks) == [row.index for row in job.rows if row.steps_left]
    rest = iter(tasks)
    for together, _, left in job.rest.waves:
        wave: list[RowState] = []
        while left:
            wave.append(next(rest))
            left -= sum(wave[-1].at(level) for level in range(1, wave[-1].steps_left + 1))
        assert len(wave) == together
        steps = [row.steps_left for row in wave]
        assert steps == sorted(steps, reverse=True)
    if tasks:
        behind = list(takewhile(lambda row: row.steps_left == tasks[0].steps_left, tasks))
        first = job.furthest_behind()
        assert first
        assert set(first) <= set(behind)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 30), st.integers(0, 30))
def test_an_image_that_is_guided_in_a_part_of_its_steps_costs_what_these_and_the_others_do(
    steps: int, branches: int, begin: int, end: int
) -> None:
    table = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
    guided = len(range(steps)[min(begin, end) : max(begin, end)])
    job = job_of(((steps, branches, min(begin, end), max(begin, end)),), machine_of(table))
    assert job.seconds == pytest.approx(guided * table[branches] + (steps - guided) * table[1])
    assert job.left == guided * branches + (steps - guided)


# Stages


ALL = StageWork(texts=2, uploads=1, decoded=True, checked=True, values=(100, 300))


def a_machine() -> Machine:
    """A text takes 0.5 s, a pass and a check 1 s, decoding and an upload 2 s, 100 values of the answer 1 s."""
    return machine_of({1: 1.0}, decode={1: 2.0}, encode=2.0, answer=PerValue(0.01, 0.0), text=0.5, check=1.0)


def test_a_job_is_done_when_all_of_its_stages_are() -> None:
    job = job_of(alike(2, 1), a_machine(), ALL)
    assert (job.encode_s, job.work, job.check_s) == pytest.approx((3.0, 2.0, 2.0))
    assert (job.answer_s, job.piece_s) == pytest.approx((5.0, 3.0))
    shares = [job.fraction]

    def run_one() -> None:
        job.count([next(iter(job.behind_first()))])

    encodes = (job.text_encoded, job.upload_encoded, job.text_encoded)
    an_image = (run_one, job.decoded, job.checked, job.answered)
    for piece in (*encodes, *an_image, *an_image, job.answered):
        assert not job.is_done
        assert job.encoding is (job.encode_s > 0) is (len(shares) <= len(encodes))
        piece()
        shares.append(job.fraction)
    assert job.is_done
    seconds = [0, 0.5, 2, 0.5, *[1, 2, 1, 1] * 2, 3]
    assert shares == pytest.approx([sum(seconds[: i + 1]) / 16 for i in range(len(seconds))])


@pytest.mark.parametrize("stages", [StageWork(texts=1), StageWork(uploads=1), StageWork(texts=3, uploads=1)])
def test_no_row_may_run_before_all_is_encoded(stages: StageWork) -> None:
    job = job_of(alike(1, 1), a_machine(), stages)
    pieces = [job.text_encoded] * stages.texts + [job.upload_encoded] * stages.uploads
    for piece in pieces:
        assert job.encoding
        piece()
    assert not job.encoding
    assert job.encode_s == 0


def test_what_waits_for_each_stage_is_what_the_stages_before_have_done() -> None:
    job = job_of(((1, 1), (1, 1)), a_machine(), StageWork(decoded=True, checked=True, values=(100, 300)))
    seen = [(job.decoding, job.checking, job.ready)]
    for row in job.rows:
        job.count([row])
        job.end(row)
        seen.append((job.decoding, job.checking, job.ready))
    pieces = (job.decoded, job.decoded, job.checked, job.checked, job.answered, job.answered, job.answered)
    for piece in pieces:
        piece()
        seen.append((job.decoding, job.checking, job.ready))
    nothing, one, two, whole = (0, 0), (1, 100), (2, 200), (1, 300)
    assert seen == [
        (0, 0, nothing), (1, 0, nothing), (2, 0, nothing), (1, 1, nothing), (0, 2, nothing), (0, 1, one), (0, 0, two),
        (0, 0, one), (0, 0, whole), (0, 0, nothing),
    ]  # fmt: skip


def test_a_job_without_steps_is_its_stages() -> None:
    job = job_of(((0, 1),), a_machine(), StageWork(uploads=1, values=(100, 300)))
    assert (job.left, job.steps, job.seconds, job.unstepped, list(job.behind_first())) == (0, 0, 0, 0, [])
    assert job.ready == (0, 0)
    job.upload_encoded()
    assert job.ready == (1, 100)


@given(machines(), varied_images, any_passes, st.booleans(), st.lists(st.floats(0.2, 5.0), max_size=30))
def test_the_share_that_is_done_never_falls_whatever_costs_become(
    machine: Machine, images: Images, passes: list[int], decoded: bool, changes: list[float]
) -> None:
    decoded, texts = decoded and bool(machine.decode), 0 if machine.text is None else 2
    stages = StageWork(texts=texts, decoded=decoded, checked=bool(machine.check), values=(1, 2))
    job = job_of(images, machine, stages)
    assert job.fraction == 0
    for _ in range(job.texts):
        job.text_encoded()
    last = job.fraction
    for rows in passes:
        run(job, rows)
        if changes:
            job.costs.follow(1, changes.pop() * job.costs.seconds(1))
            job.weigh()
        assert last <= job.fraction <= 1
        last = job.fraction
    while job.left:
        job.count(plan(job))
    for _ in range(job.undecoded):
        job.decoded()
    for _ in range(job.unchecked):
        job.checked()
    for _ in range(job.unanswered):
        assert job.fraction < 1
        job.answered()
    assert job.fraction == 1


def test_both_branches_of_a_task_may_be_counted_at_once() -> None:
    job = job_of(alike(2, 2, 2), machine_of({4: 1.0}))
    [a, b] = job.rows
    job.count([a, a, b])
    assert (a.steps_left, list(a.branches), b.steps_left, list(b.branches)) == (1, [0, 1], 2, [1])
    assert (job.left, job.steps) == (5, 2)


@given(varied_images, any_passes, st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_other_costs_weigh_a_job_anew(images: Images, passes: list[int], seconds: list[float]) -> None:
    """Widths may change too. `seconds` stays enough for the plan."""
    job = partly_run({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}, images, passes)
    for width, taken in enumerate(seconds, 1):
        for _ in range(30):
            job.costs.follow(width, taken)
    job.weigh()
    weighed = job.seconds
    assert sum(job.costs.ceilings[rows] for rows in to_the_end(job)) == pytest.approx(weighed)


@given(cost_tables, varied_images, any_passes, st.booleans())
def test_images_that_are_decoded_are_still_to_be_whatever_has_run(
    table: dict[int, float], images: Images, passes: list[int], decoded: bool
) -> None:
    machine = machine_of(table, decode=table)
    job, plain = job_of(images, machine, StageWork(decoded=decoded)), job_of(images, machine)
    for rows in passes:
        run(job, rows)
        run(plain, rows)
        assert (job.left, job.steps, job.rest.waves) == (plain.left, plain.steps, plain.rest.waves)
        assert job.seconds == plain.seconds
        assert job.undecoded == (len(images) if decoded else 0)
