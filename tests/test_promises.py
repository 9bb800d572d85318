"""Promises are as early as possible, and each plan keeps its spare time, with one group and with several."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.engine.bounds import MARGIN, SHARED, Bounds, Spare, spare
from service.engine.choosing import fill, filled, first_alone
from service.engine.costs import Costs, Machine, PerValue
from service.engine.jobs import Batch, Job
from service.engine.outstanding import Busy, Outstanding
from service.engine.promises import PATIENCE, SHORTEST, earliest, patient
from service.engine.room import enter, follow
from service.engine.stage_work import Behind, Blocks, StageWork, largest_pieces
from service.engine.turns import let_run
from tests.lines import GROUPS, Images, alike, any_images, cost_tables, job_of, machine_of, machines, varied_images
from tests.properties import examples

ROUNDING = 1e-7
START = 100.0

BETWEEN = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
EQUAL = {4: 1.0}


class Told(Bounds):
    """The bounds of each plan, told a second time: job by job, in plain sums."""

    def alone(self, seconds: float) -> float:
        """The bound for a job's steps. `seconds` is the time of the job and the jobs ahead at speed 1."""
        return self.unit * seconds

    def together(self, job: Job, ahead: Iterable[Job]) -> float:
        """The bound for a job's steps, behind these other jobs."""
        seconds = sum(self.filling(job))
        most: dict[Costs, float] = {}
        for other in ahead:
            costs = other.costs
            rows, steps = self.filling(other)
            seconds += rows
            if costs is not job.costs and other.waits:
                seconds += steps
            elif costs is not job.costs:
                most[costs] = max(most.get(costs, 0.0), steps)
        return seconds + sum(most.values())

    def decoded(self, job: Job, ahead: Iterable[Job]) -> float:
        """The seconds from a job's last step to its last image, behind these other jobs."""
        if not job.undecoded:
            return 0.0
        images = self.images[job.costs]
        seconds = images.image * (job.undecoded - 1) + images.full + self.decode * job.blocks.decode
        for other in ahead:
            seconds += other.undecoded * self.images[other.costs].image
        return seconds

    def checked(self, job: Job, ahead: Iterable[Job]) -> float:
        """The seconds from a job's last image to the end of its last check, behind these other jobs."""
        if not job.unchecked:
            return 0.0
        return self.check * (job.blocks.check + job.check_s + sum(other.check_s for other in ahead))

    def answered(self, job: Job, ahead: Iterable[Job]) -> float:
        """The seconds from a job's last image or check to the end of its answer, behind these other jobs."""
        if not job.unanswered:
            return 0.0
        return self.answer * (job.blocks.answer + job.answer_s + sum(other.answer_s for other in ahead))


def in_order(job: Job) -> tuple[float, float]:
    return job.promise, job.number


@dataclass
class Crowd:
    """Jobs in line with their promises."""

    machine: Machine
    line: list[Job] = field(default_factory=list)
    arrived: int = 0

    def add(self, job: Job, promise: float) -> None:
        self.arrived += 1
        job.promise, job.number = promise, self.arrived
        place = bisect_left(self.line, in_order(job), key=in_order)
        enter(job, self.line, place, self.machine)
        self.line.insert(place, job)

    def take(self, job: Job, wanted: float) -> float:
        """Add a job with its earliest promise."""
        promise = earliest(job, self.line, self.machine, START, wanted)
        self.add(job, promise)
        return promise

    def encode(self, job: Job) -> None:
        """All texts and the upload of a job are encoded."""
        for _ in range(job.texts):
            job.text_encoded()
        for _ in range(job.uploads):
            job.upload_encoded()
        let_run(self.line, Outstanding(self.machine))

    def run(self, batch: Batch) -> None:
        rows: dict[Job, list[object]] = {}
        for row, _ in batch:
            rows.setdefault(row.job, []).append(row)
        for job, ran in rows.items():
            job.count(ran)  # type: ignore[arg-type]
            for row in dict.fromkeys(row for row, _ in batch if row.job is job and not row.steps_left):
                job.end(row)
        self.line = [job for job in self.line if not job.is_done]

    def due(self, group: object, rows: int) -> Batch:
        """Some of the due rows of a group: row i if bit i is set."""
        batch: Batch = []
        for job in self.line:
            if job.group == group and not job.waits:
                fill(batch, job, 24, len(job.rows))
        return [row for i, row in enumerate(batch) if rows >> i & 1]

    def spare(self, start: float = START) -> Spare:
        return spare(self.line, self.machine, start)


any_bits = st.integers(0, 2**24 - 1)


@st.composite
def any_jobs(draw: st.DrawFn, machine: Machine, images: st.SearchStrategy[Images], stages: bool) -> Job:
    work = StageWork()
    if stages:
        work = StageWork(
            texts=0 if machine.text is None else draw(st.integers(0, 3)),
            uploads=draw(st.integers(0, 2)) if machine.encode else 0,
            decoded=bool(machine.decode) and draw(st.booleans()),
            checked=bool(machine.check) and draw(st.booleans()),
            values=draw(st.one_of(st.none(), st.tuples(st.integers(0, 20), st.integers(0, 100)))),
        )
    return job_of(draw(images), machine, work, draw(st.sampled_from(list(machine.passes))))


any_machines = machines()


@st.composite
def crowds(
    draw: st.DrawFn,
    of: st.SearchStrategy[Machine] = any_machines,
    images: st.SearchStrategy[Images] = varied_images,
    stages: bool = True,
    max_size: int = 6,
) -> Crowd:
    """Each job has its earliest possible promise, or a later one as requested. Some have run a part of their work."""
    crowd = Crowd(draw(of))
    for _ in range(draw(st.integers(0, max_size))):
        wanted = draw(st.sampled_from((0.0, 0.0, START))) + draw(st.floats(0.0, 100.0))
        crowd.take(draw(any_jobs(crowd.machine, images, stages)), wanted)
    for rows in draw(st.lists(any_bits, max_size=4)):
        crowd.run(crowd.due(draw(st.sampled_from(list(crowd.machine.passes))), rows))
    for job in list(crowd.line):
        for _ in range(draw(st.integers(0, job.texts))):
            job.text_encoded()
        let_run(crowd.line, Outstanding(crowd.machine))
        for _ in range(draw(st.integers(0, job.decoding))):
            job.decoded()
        for _ in range(draw(st.integers(0, job.checking))):
            job.checked()
    return crowd


one_group = st.builds(machine_of, cost_tables)
two_groups = st.builds(machine_of, cost_tables, cost_tables)
plain_crowds = crowds(st.one_of(one_group, two_groups), stages=False)


def later(after: Spare, before: Spare) -> None:
    """Both plans have at least as much to spare as before."""
    assert after.alone >= before.alone - ROUNDING
    assert after.together >= before.together - ROUNDING


def to_spare(crowd: Crowd) -> Spare:
    """What the plans leave, with a separate sum for each job, even for one that waits only for stages."""
    bounds, line = Told(crowd.machine), crowd.line
    alone, together = [inf], [inf]
    for place, job in enumerate(line):
        ahead = line[:place]
        start = max(START, job.free_by) if job.waits else START
        left = job.promise - start - bounds.decoded(job, ahead) - bounds.checked(job, ahead)
        left -= bounds.answered(job, ahead)
        alone.append(left - (bounds.alone(sum(one.seconds for one in [*ahead, job])) if job.left else 0.0))
        together.append(left - (bounds.together(job, ahead) if job.left else 0.0))
    return Spare(min(alone), min(together))


def all_work(crowd: Crowd, room: Blocks) -> float:
    """The seconds of all work in line, one piece after the other, and of the largest pieces."""
    bounds, line, most = Told(crowd.machine), crowd.line, largest_pieces(crowd.machine)
    seconds = bounds.unit * max(most.a_pass, room.a_pass) + bounds.decode * most.decode + bounds.check * most.check
    seconds += bounds.answer * max(room.answer, *(job.piece_s for job in line), *(job.blocks.answer for job in line))
    for job in line:
        seconds += max(bounds.unit * job.seconds, sum(bounds.filling(job))) + bounds.encode * job.encode_s
        images = bounds.images.get(job.costs)
        seconds += images.full * job.undecoded if images is not None else 0.0
        seconds += bounds.check * job.check_s + bounds.answer * job.answer_s
    return seconds


# Why promises are kept


@examples(200)
@given(crowds(), st.data(), st.floats(0.0, 300.0))
def test_a_promise_breaks_none(crowd: Crowd, data: st.DataObject, wanted: float) -> None:
    """Neither does the work that the job may have under way in a stage when another job gets there.

    The job waits at most for all who were promised before, and then for all work, its own included.
    """
    had = max(to_spare(crowd))
    job = data.draw(any_jobs(crowd.machine, varied_images, stages=True))
    before = [(one.promise, one.left, one.seconds, one.blocks, one.free_by) for one in crowd.line]
    room = data.draw(st.sampled_from((Blocks(), largest_pieces(crowd.machine))))
    promise = earliest(job, crowd.line, crowd.machine, START, wanted, room=room)
    assert [(one.promise, one.left, one.seconds, one.blocks, one.free_by) for one in crowd.line] == before
    assert promise >= wanted
    crowd.add(job, promise)
    assert max(to_spare(crowd)) >= min(0.0, had) - ROUNDING
    assert all(one.promise >= one.done_by - ROUNDING for one in crowd.line)
    last = max([wanted, START, *(one.promise for one in crowd.line if one is not job)]) - min(0.0, had)
    assert promise <= last + all_work(crowd, room) + ROUNDING


@given(crowds())
def test_passes_have_to_spare_what_is_not_needed_for_steps_and_stages(crowd: Crowd) -> None:
    """All time is spare of a job that only waits for stages, and of a job whose texts or upload are not encoded."""
    left, others = crowd.spare(), [job for job in crowd.line if not job.left or job.waits]
    slack = to_spare(crowd)
    promises = [job.promise for job in others]
    for job in others:
        job.promise = inf
    without = to_spare(crowd)
    for job, promise in zip(others, promises, strict=True):
        job.promise = promise
    for plan in ("alone", "together"):
        found = getattr(left, plan)
        if found < getattr(without, plan) - ROUNDING:  # the plan would break the promise of a job that cannot run yet
            assert found < 0
            assert found >= getattr(slack, plan) - ROUNDING
        else:
            assert found == pytest.approx(getattr(without, plan))


@examples(200)
@given(crowds(), st.data(), any_bits, st.integers(0, 24), st.integers(0, 24), st.booleans())
def test_nothing_that_runs_leaves_a_plan_less_to_spare_than_the_time_it_takes(
    crowd: Crowd, data: st.DataObject, rows: int, images: int, checks: int, answers: bool
) -> None:
    left = [crowd.spare()]
    crowd.run(crowd.due(data.draw(st.sampled_from(list(crowd.machine.passes))), rows))
    left.append(crowd.spare())
    for job in crowd.line:
        for _ in range(min(images, job.decoding)):
            job.decoded()
    left.append(crowd.spare())
    for job in crowd.line:
        for _ in range(min(checks, job.checking)):
            job.checked()
    left.append(crowd.spare())
    for job in crowd.line:
        if answers:
            for _ in range(job.ready[0]):
                job.answered()
    left.append(crowd.spare())
    for before, after in pairwise(left):
        later(after, before)


@given(crowds(), st.integers(0, 5))
def test_a_job_that_leaves_takes_nothing_from_others(crowd: Crowd, place: int) -> None:
    assume(place < len(crowd.line))
    before = crowd.spare()
    del crowd.line[place]
    later(crowd.spare(), before)


@examples(200)
@given(crowds(), st.sampled_from(("alone", "together")), st.booleans())
def test_a_plan_keeps_what_it_has_to_spare_while_it_is_followed(crowd: Crowd, plan: str, early: bool) -> None:
    """Whatever the group of each pass is. Texts and uploads are encoded in time or earlier. Nothing else has begun."""
    now = START

    def left() -> float:
        return float(getattr(crowd.spare(now), plan))

    def next_pass() -> tuple[Batch, float]:
        batch = filled(crowd.line, crowd.machine.one_by_one) if plan == "together" else first_alone(crowd.line)
        costs = batch[0][0].job.costs
        return batch, costs.ceilings[len(batch)] * costs.speed * (1 + MARGIN)

    while any(job.left for job in crowd.line):
        if not any(job.left and not job.waits for job in crowd.line):
            first = min((job for job in crowd.line if job.encoding), key=lambda job: job.free_by)
            had, now = left(), max(now, first.free_by)
            crowd.encode(first)
            assert left() >= min(0.0, had) - ROUNDING
            continue
        batch, seconds = next_pass()
        if to_run := [job for job in crowd.line if job.encoding and (early or job.free_by < now + seconds)]:
            had = left()
            crowd.encode(to_run[0])
            assert left() >= min(0.0, had) - ROUNDING
            continue
        had, now = left(), now + seconds
        assert len({row.job.group for row, _ in batch}) == 1
        crowd.run(batch)
        assert left() >= had - ROUNDING


def test_room_for_the_pieces_of_others_follows_their_costs() -> None:
    """A job that had no time for such room gets none later."""
    machine = machine_of({1: 1.0}, {1: 2.0}, decode={1: 1.0}, text=1.0, answer=PerValue(0.1, 0.0, largest=10))
    before = largest_pieces(machine)
    roomy, tight = (job_of(alike(1, 1), machine, StageWork(texts=1, decoded=True)) for _ in range(2))
    earliest(roomy, [], machine, START, START, room=before)
    earliest(tight, [], machine, START, START)
    had, large = roomy.free_by, GROUPS[1]
    for _ in range(50):
        for costs, seconds in ((machine.passes[large], 3.0), (machine.decode[large], 1.5)):
            costs.follow(1, seconds * costs.speed)
    now = largest_pieces(machine)
    assert now.a_pass > before.a_pass
    assert now.decode > before.decode
    follow([roomy, tight], before, now, machine)
    assert (roomy.blocks.a_pass, roomy.blocks.decode) == (now.a_pass, now.decode)
    assert roomy.free_by == pytest.approx(had + Bounds(machine).unit * (now.a_pass - before.a_pass))
    assert tight.blocks.a_pass == 1.0


# How early promises are


@examples(200)
@given(plain_crowds, st.data(), st.floats(0.0, 300.0))
def test_no_earlier_promise_could_be_kept(crowd: Crowd, data: st.DataObject, wanted: float) -> None:
    """Compares with a search over all places in line, for both plans."""
    machine, bounds = crowd.machine, Told(crowd.machine)
    job = data.draw(any_jobs(machine, varied_images, stages=False))
    found = earliest(job, crowd.line, machine, START, wanted)
    candidates = {wanted, *(other.promise for other in crowd.line)}
    for place in range(len(crowd.line) + 1):
        ahead = crowd.line[:place]
        candidates.add(START + bounds.alone(job.seconds + sum(other.seconds for other in ahead)))
        candidates.add(START + bounds.together(job, ahead))
    possible = [promise for promise in candidates if promise >= wanted and holds(crowd, job, promise)]
    assert found == pytest.approx(min(possible), abs=ROUNDING)


def holds(crowd: Crowd, job: Job, promise: float) -> bool:
    """Whether a plan keeps all promises with this one."""
    job.promise, job.number = promise, inf
    with_it = Crowd(crowd.machine, sorted([*crowd.line, job], key=in_order))
    return max(to_spare(with_it)) >= -1e-10


@st.composite
def same_decoding(draw: st.DrawFn) -> Machine:
    """Batches, and checks, cost the same in all groups, so that no job blocks another for longer."""
    tables = draw(st.lists(cost_tables, min_size=1, max_size=3))
    return machine_of(*tables, decode=draw(cost_tables), check=draw(st.floats(0.01, 2.0)))


@examples(200)
@given(st.data(), same_decoding(), st.floats(0.0, 300.0))
def test_no_earlier_promise_could_be_kept_where_images_are_decoded_and_checked(
    data: st.DataObject, machine: Machine, wanted: float
) -> None:
    """Compares with a search over all places in line, for both plans."""
    bounds, crowd = Told(machine), Crowd(machine)
    stages = st.builds(
        lambda decoded, checked: StageWork(decoded=decoded, checked=checked), st.booleans(), st.booleans()
    )
    jobs = st.builds(
        lambda images, work, group: job_of(images, machine, work, group),
        any_images,
        stages,
        st.sampled_from(list(machine.passes)),
    )
    for other in data.draw(st.lists(jobs, max_size=5)):
        crowd.take(other, data.draw(st.sampled_from((0.0, START, START + 50))))
    job = data.draw(jobs)
    found = earliest(job, crowd.line, machine, START, wanted)
    candidates = {wanted, *(other.promise for other in crowd.line)}
    for place in range(len(crowd.line) + 1):
        ahead = crowd.line[:place]
        after = START + bounds.decoded(job, ahead) + bounds.checked(job, ahead)
        candidates.add(after + bounds.alone(job.seconds + sum(other.seconds for other in ahead)))
        candidates.add(after + bounds.together(job, ahead))
    possible = [promise for promise in candidates if promise >= wanted and holds(crowd, job, promise)]
    assert found == pytest.approx(min(possible), abs=ROUNDING)


@given(st.data(), st.one_of(one_group, two_groups), st.floats(0.0, 300.0))
def test_where_promises_are_late_already_a_new_one_is_what_the_better_plan_could_keep(
    data: st.DataObject, machine: Machine, wanted: float
) -> None:
    """As on a machine that has become slower."""
    crowd = Crowd(machine)
    for _ in range(data.draw(st.integers(0, 6))):
        crowd.add(data.draw(any_jobs(machine, any_images, False)), START + data.draw(st.floats(-10.0, 100.0)))
    before = crowd.spare()
    job = data.draw(any_jobs(machine, any_images, False))
    promise = earliest(job, crowd.line, machine, START, wanted)
    assert wanted <= promise < inf
    crowd.add(job, promise)
    assert max(crowd.spare()) >= min(max(before), 0) - ROUNDING  # no job becomes later
    ahead, bounds = crowd.line[: crowd.line.index(job)], Told(machine)
    alone = promise - START - bounds.alone(job.seconds + sum(one.seconds for one in ahead))
    together = promise - START - bounds.together(job, ahead)
    better = alone if before.alone > before.together else together
    assert better >= -ROUNDING or max(alone, together) >= -ROUNDING


@given(cost_tables, any_images)
def test_an_idle_server_promises_the_sooner_of_both_plans(table: dict[int, float], images: Images) -> None:
    machine = machine_of(table, table)
    job, bounds = job_of(images, machine), Told(machine)
    shortest = min(bounds.alone(job.seconds), bounds.together(job, []))
    assert earliest(job, [], machine, START, 0.0) == pytest.approx(START + shortest)
    assert earliest(job, [], machine, START, START + shortest + 1) == START + shortest + 1


def test_a_new_job_goes_ahead_of_those_that_can_wait_and_of_no_other() -> None:
    machine = machine_of({1: 0.8})  # a second with the margin
    crowd = Crowd(machine)
    for steps, promise in ((5, 106.0), (5, 120.0), (5, 140.0)):
        crowd.add(job_of(alike(1, steps), machine), promise)
    for steps, promise in ((1, 101.0), (2, 107.0), (10, 115.0), (11, 121.0), (25, 135.0), (26, 141.0)):
        assert earliest(job_of(alike(1, steps), machine), crowd.line, machine, START, 0.0) == pytest.approx(promise)


def test_of_equal_promises_the_first_given_is_the_first_kept() -> None:
    machine = machine_of({1: 0.8})
    crowd = Crowd(machine)
    crowd.add(job_of(alike(1, 5), machine), 105.0)
    assert earliest(job_of(alike(1, 1), machine), crowd.line, machine, START, 105.0) == pytest.approx(106.0)


def test_a_job_that_must_wait_for_another_to_its_own_promise_gets_a_later_one() -> None:
    """Ahead of the other job it would take 8 s. But that equals the other's promise, and the older goes first."""
    machine = machine_of({4: 0.8})
    crowd = Crowd(machine)
    crowd.add(job_of(alike(4, 1), machine), 108.0)
    assert earliest(job_of(alike(1, 8), machine), crowd.line, machine, START, 0.0) == pytest.approx(109.0)


def test_a_plan_that_has_less_to_spare_may_promise_more() -> None:
    """In the plan `alone`, guided rows leave a third of each pass empty."""
    machine = machine_of({1: 0.4, 3: 0.8})
    crowd = Crowd(machine)
    crowd.add(job_of(alike(1, 10), machine), 1000.0)
    left = crowd.spare()
    assert left.alone > left.together > 500
    promise = earliest(job_of(alike(4, 10, 2), machine), crowd.line, machine, START, 0.0)
    assert promise == pytest.approx(START + 80 / 3 + 10 * 2 / 3)


def test_the_start_is_when_the_next_pass_can_begin() -> None:
    machine = machine_of({1: 0.8})
    job = job_of(alike(1, 3), machine)
    assert earliest(job, [], machine, 50.0, 0.0) == pytest.approx(53.0)
    assert earliest(job, [], machine, 51.5, 0.0) == pytest.approx(54.5)


def test_a_piece_that_another_job_has_no_room_for_is_promised_to_wait_for_it_and_a_smaller_one_is_not() -> None:
    """The first job has 3 s to spare. Another's piece may be under way when its image is finished."""
    machine = machine_of({1: 0.8}, answer=PerValue(0.4, 0.0))  # a second a step, and a second a value
    crowd = Crowd(machine)
    first = job_of(alike(1, 5), machine, StageWork(values=(1, 0)))
    crowd.add(first, earliest(first, [], machine, START, START + 9.0))
    large = job_of(alike(1, 1), machine, StageWork(values=(4, 0)))
    crowd.take(large, 0.0)
    assert large.behind == Behind(answer=START + 9.0)
    assert large.promise == pytest.approx(START + 9.0 + 4.0 + 4.0)  # its own piece, and one like it under way
    assert first.blocks.answer == pytest.approx(0.4)
    small = job_of(alike(1, 50), machine, StageWork(values=(2, 0)))
    crowd.take(small, START + 500.0)
    assert small.behind == Behind()
    assert first.blocks.answer == pytest.approx(0.8)


def test_what_comes_between_adds_to_the_promise_of_a_job_that_waits() -> None:
    machine = machine_of({1: 0.8}, answer=PerValue(0.4, 0.0))
    crowd = Crowd(machine)
    first, small, large = (job_of(alike(1, n), machine, StageWork(values=(n, 0))) for n in (1, 1, 4))
    crowd.take(first, 0.0)
    crowd.take(large, START + 20.0)
    assert large.done_by == pytest.approx(first.promise + 4.0 + 4.0)
    crowd.take(small, START + 10.0)
    assert [one.promise - START for one in crowd.line] == pytest.approx([3.0, 10.0, 20.0])
    assert large.done_by == pytest.approx(first.promise + 4.0 + 4.0 + 1.0)


def test_a_check_that_another_job_has_no_time_for_waits_and_a_shorter_one_does_not() -> None:
    """The first job has 3 s to spare. A check of another group's image may be under way when its image is finished."""
    machine = machine_of({1: 0.8}, {1: 0.8})
    machine = Machine(
        machine.passes, check={group: Costs({1: 0.4 * n}) for group, n in zip(GROUPS, (1, 4), strict=False)}
    )
    crowd = Crowd(machine)
    first = job_of(alike(1, 5), machine, StageWork(checked=True))
    crowd.add(first, earliest(first, [], machine, START, START + 9.0))
    slow = job_of(alike(1, 50), machine, StageWork(checked=True), GROUPS[1])
    assert earliest(slow, crowd.line, machine, START, START + 500.0) == START + 500.0
    assert slow.behind == Behind(check=START + 9.0)
    same = job_of(alike(1, 50), machine, StageWork(checked=True))
    assert earliest(same, crowd.line, machine, START, START + 500.0) == START + 500.0
    assert same.behind == Behind()


@pytest.mark.parametrize(("texts", "uploads"), [(1, 0), (3, 0), (0, 1), (2, 2)])
def test_a_promise_has_all_that_is_encoded_first_and_what_is_ahead_of_it(texts: int, uploads: int) -> None:
    machine = machine_of({1: 0.8}, encode=2.0, text=0.5)
    plain, job = job_of(alike(1, 5), machine), job_of(alike(1, 5), machine, StageWork(texts, uploads))
    encode_s = (0.5 * texts + 2.0 * uploads) * SHARED * (1 + MARGIN)
    waits = earliest(job, [], machine, START, 0.0) - earliest(plain, [], machine, START, 0.0)
    assert waits == pytest.approx(encode_s + 1.0)  # a pass may be under way when its rows may run
    crowd = Crowd(machine)
    ahead = job_of(alike(1, 1), machine, StageWork(texts=1))
    crowd.take(ahead, 0.0)
    ahead.text_encoded()
    crowd.take(job_of(alike(1, 1), machine, StageWork(texts=1)), 0.0)
    behind = earliest(job, crowd.line, machine, START, START + 100.0)
    assert behind == START + 100.0
    assert job.free_by == pytest.approx(START + 0.5 * SHARED * (1 + MARGIN) + encode_s + 1.0)


def test_a_piece_under_way_of_a_job_that_has_left_counts() -> None:
    machine, busy = machine_of({1: 0.8}, answer=PerValue(0.4, 0.0)), Busy()
    gone, job = (job_of(alike(1, 1), machine, StageWork(values=(1, 0))) for _ in range(2))
    shortest = earliest(job, [], machine, START, 0.0, busy)
    busy.began("answer", 4.0, frozenset([gone]))
    assert earliest(job, [gone], machine, START, 0.0, busy) < shortest + 4.0
    busy.left(gone)
    assert earliest(job, [], machine, START, 0.0, busy) == pytest.approx(
        shortest + (4.0 - 0.4) * SHARED * (1 + MARGIN)  # a piece like its own counts in any case
    )


def test_so_does_a_check_and_a_text() -> None:
    machine, busy = machine_of({1: 0.8}, check=0.4, text=0.4), Busy()
    gone, job = (job_of(alike(1, 1), machine, StageWork(texts=1, checked=True)) for _ in range(2))
    for stage, more in (("check", 4.0 - 0.4), ("encode", 4.0)):
        shortest = earliest(job, [], machine, START, 0.0, busy)
        busy.began(stage, 4.0, frozenset([gone]))
        busy.left(gone)
        assert earliest(job, [], machine, START, 0.0, busy) == pytest.approx(shortest + more * SHARED * (1 + MARGIN))


# Numbers


def test_bounds_are_seconds_with_the_margin() -> None:
    machine = machine_of(BETWEEN, {2: 6.0})
    small, large = (job_of(alike(4, 5), machine, group=group) for group in GROUPS[:2])
    bounds, margin = Told(machine), 1 + MARGIN
    assert bounds.alone(8.0) == pytest.approx(8.0 * margin)
    assert bounds.together(small, [small]) == pytest.approx((40 / 4 + 5 * 3 / 4) * 2.5 * margin)
    alone = (20 / 4 + 5 * 3 / 4) * 2.5
    assert bounds.together(small, [large, large]) == pytest.approx((alone + (40 / 2 + 5 / 2) * 6.0) * margin)


def test_a_slower_machine_has_longer_bounds_in_all_groups() -> None:
    machine = machine_of(BETWEEN, {2: 6.0})
    job = job_of(alike(10, 1), machine, group=GROUPS[1])
    before = Told(machine)
    for _ in range(50):
        machine.passes[GROUPS[0]].follow(4, 5.0)
    after = Told(machine)
    assert after.unit == pytest.approx(machine.passes[GROUPS[1]].speed * (1 + MARGIN))
    assert after.alone(1.0) > 1.5 * before.alone(1.0)
    assert after.together(job, []) > 1.5 * before.together(job, [])


def test_what_is_to_spare_is_what_the_tightest_promise_leaves() -> None:
    machine = machine_of(EQUAL)
    crowd = Crowd(machine)
    crowd.add(job_of(alike(4, 4), machine), START + 10.0)
    crowd.add(job_of(alike(1, 8), machine), START + 20.0)
    left = crowd.spare()
    assert left.alone == pytest.approx(min(10 - 4 * 1.25, 20 - 12 * 1.25))
    assert left.together == pytest.approx(min(10 - (16 / 4 + 4 * 3 / 4) * 1.25, 20 - (24 / 4 + 8 * 3 / 4) * 1.25))
    assert crowd.spare(START + 1.0) == pytest.approx([left.alone - 1, left.together - 1])


def test_nobody_in_line_leaves_all_the_time_to_spare() -> None:
    machine = machine_of(EQUAL)
    assert spare([], machine, START) == (inf, inf)
    assert spare([job_of(alike(1, 1), machine)], machine, START) == (inf, inf)  # without a promise


def a_patient_promise(job: Job, others: Sequence[Job], machine: Machine) -> float:
    work = Outstanding(machine)
    for other in others:
        work.add(other)
    return patient(job, work, machine)


@given(cost_tables, any_images, st.lists(any_images, max_size=3))
def test_a_patient_promise_is_a_multiple_of_the_work_ahead(
    table: dict[int, float], images: Images, others: list[Images]
) -> None:
    machine = machine_of(table)
    job, ahead = job_of(images, machine), [job_of(other, machine) for other in others]
    in_full_passes = Told(machine).together(job, ahead) / (1 + MARGIN)
    assert a_patient_promise(job, ahead, machine) == pytest.approx(max(SHORTEST, PATIENCE * in_full_passes))


@given(crowds(), st.data())
def test_a_patient_promise_counts_all_stages_of_all_groups(crowd: Crowd, data: st.DataObject) -> None:
    """It is at least twice the expected seconds of the job's own work."""
    machine = crowd.machine
    job = data.draw(any_jobs(machine, varied_images, stages=True))
    rows, decode = Counter(one.group for one in crowd.line for _ in range(one.left)), 0.0
    if job.undecoded:
        costs = machine.decode[job.group]
        decode = costs.ceilings[costs.width] * (1 + (job.undecoded - 1) / costs.width)
    own = job.work + decode + job.check_s + job.answer_s + job.encode_s
    ahead = sum(n * machine.passes[group].row for group, n in rows.items())
    assert a_patient_promise(job, crowd.line, machine) >= PATIENCE * (own + ahead) - ROUNDING


def test_bounds_of_decoding_are_seconds_beside_passes_with_the_margin() -> None:
    machine = machine_of(EQUAL, decode={1: 1.0, 4: 2.0})
    others = [job_of(alike(5, 1), machine, StageWork(decoded=True))]
    decoded, plain = job_of(alike(1, 1), machine, StageWork(decoded=True)), job_of(alike(1, 1), machine)
    earliest(decoded, others, machine, START, 0.0)
    a_batch = 2.0 * SHARED * (1 + MARGIN)
    assert Told(machine).decoded(decoded, others) == pytest.approx((6 / 4 + 2 - 1 / 4) * a_batch)
    assert Told(machine).decoded(plain, others) == 0
    for _ in range(50):
        machine.decode[GROUPS[0]].follow(4, 4.0)
    assert Told(machine).decoded(decoded, others) > 1.5 * (6 / 4 + 2 - 1 / 4) * a_batch
