"""Chooses the rows of the next pass. Pure Python: no torch, no asyncio, no clock.

The jobs with the least work left go first, so short requests overtake long ones. Work is seconds of passes. The first
job picks the group of the pass, and jobs of this group fill the pass. Shortest-first uses up the spare time of the
plans in bounds.py. When no time is left, the scheduler follows a plan: jobs go in the order of promises.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf

from model.rows import Group
from service.engine.bounds import spare
from service.engine.choosing import at_most, filled, first_alone, full_pass, shortest_first, trial
from service.engine.costs import Machine
from service.engine.jobs import Batch, Job
from service.engine.outstanding import Busy, Outstanding
from service.engine.room import enter, follow, note_orphan
from service.engine.stage_work import largest_pieces
from service.engine.turns import Stage, let_run
from service.engine.waves import RowState

_FEW = 8  # jobs


class Scheduler:
    """The jobs, ordered by work and by promise.

    Args:
        machine: what work costs.
        max_started: by group. While this many rows run, another row starts only to keep a promise.

    Attributes:
        work: what is accepted and not done.
        busy: what the stages have under way.
        waiting: rows with steps that have not started.
        preemptions: how often a row with steps left ran in a pass and not in the next.
        busy_until: the end of the present pass at the latest, margin included.
    """

    def __init__(self, machine: Machine, max_started: Mapping[Group, int]) -> None:
        self.machine = machine
        self.work = Outstanding(machine)
        self.busy = Busy()
        self.waiting = self.preemptions = 0
        self.busy_until = -inf
        self._running: Counter[Group] = Counter()  # rows that have started and have steps left, by group
        self._max_started = max_started
        self._version = machine.version
        self._largest = largest_pieces(machine)
        self._arrived = 0
        self._present: set[Job] = set()
        self._by_work: list[Job] = []  # jobs with forward rows left
        self._by_promise: list[Job] = []  # jobs with work left that is not in the present pass
        self._ran: set[RowState] = set()  # rows of the last pass
        self._some_wait = False  # whether passes of a job wait for another one, perhaps
        self._gave_way = False  # whether the last pass took the place of one that was not full

    # Jobs

    def add(self, job: Job, promise: float) -> None:
        """Add a job. Its promise is one that promises.earliest gave to it, or infinite. A job without work leaves."""
        self._arrived += 1
        job.number, job.promise = self._arrived, promise
        if job.is_done:
            return
        place = bisect_left(self._by_promise, _promise(job), key=_promise)
        enter(job, self._by_promise, place, self.machine)
        self._by_promise.insert(place, job)
        self._present.add(job)
        self._some_wait |= job.behind.a_pass > -inf
        if job.left:
            insort(self._by_work, job, key=_work)
        self.waiting += job.unstepped
        self.work.add(job)

    def remove(self, job: Job) -> None:
        """Take a job out, whatever part of it has run. A job that is not here is ignored."""
        if job not in self._present:
            return
        self._present.remove(job)
        if job.left:
            _take_out(self._by_work, job, _work)
        if not job.is_done:
            _take_out(self._by_promise, job, _promise)
        self.work.add(job, -1)
        started = sum(row.started for row in job.rows if not row.stepped)
        self._running[job.group] -= started
        self.waiting -= job.unstepped - started
        self.busy.left(job)
        note_orphan(self._by_promise, self.busy)
        self._some_wait = self._some_wait and let_run(self._by_promise, self.work)

    def ahead_of(self, job: Job) -> int:
        """How many jobs have less work left, or as much work and an earlier arrival."""
        return bisect_left(self._by_work, _work(job), key=_work)

    @property
    def by_promise(self) -> Sequence[Job]:
        """The jobs with work left beyond the present pass, the earliest promise first."""
        self._follow_costs()
        return self._by_promise

    @property
    def by_work(self) -> Sequence[Job]:
        """The jobs with forward rows left, the least work first."""
        self._follow_costs()
        return self._by_work

    # Counts

    @property
    def running(self) -> int:
        """Rows that have started and have steps left."""
        return self._running.total()

    @property
    def outstanding(self) -> int:
        """Forward rows still to run, without those of the present pass."""
        return self.work.forwards.total()

    @property
    def runnable(self) -> int:
        """The outstanding forward rows of jobs that wait for nothing to be encoded, here or in a job ahead."""
        return self.work.runnable

    @property
    def decoding(self) -> int:
        """Rows still to be decoded that have ended their last step."""
        return self.work.decoding.total()

    @property
    def backlog_s(self) -> float:
        """The seconds of all work in the queue."""
        return self.work.seconds

    # Passes

    def next_batch(self, now: float) -> Batch:
        """Choose the forward rows of the pass that begins now, all of one group, and count them as run."""
        self._follow_costs()
        batch = self.choose(now)
        if batch:
            self.busy_until = now + at_most(batch)
        self._count(batch)
        return batch

    def advance(self, batch: Batch) -> list[RowState]:
        """End a pass. Returns the rows of present jobs that took their last step. They leave, or go to the stages."""
        self.busy_until = -inf
        finished = [row for row in dict.fromkeys(row for row, _ in batch) if not row.steps_left]
        finished = [row for row in finished if row.job in self._present]
        for row in finished:
            with self.work.changing(row.job):
                row.job.end(row)
            self._running[row.job.group] -= 1
            if row.job.is_done and not row.job.unstepped:
                self._present.remove(row.job)
        return finished

    def choose(self, now: float) -> Batch:
        """The forward rows of the pass that begins now."""
        batch = shortest_first(self.by_work, self.may_start, self.keeps_pace)
        if not batch:
            return batch
        batch = self._give_way(batch)
        left = spare(self._by_promise, self.machine, now)
        if max(left) >= at_most(batch):
            all_can_run = self.work.runnable == self.outstanding  # promises of other jobs count no trial
            return (trial(batch, self._by_work, self.may_start, max(left)) if all_can_run else None) or batch
        if left.alone > left.together:
            return first_alone(self._by_promise)
        return filled(self._by_promise, self.machine.one_by_one)

    def _give_way(self, batch: Batch) -> Batch:
        """With many jobs: a full pass of another group instead of one that is not full, and not twice in a row."""
        full = None
        if not (self.keeps_pace or self._gave_way or len(batch) >= batch[0][0].job.costs.width):
            full = full_pass(self._by_work, self.may_start, batch)
        self._gave_way = full is not None
        return full or batch

    def may_start(self, group: Group) -> int:
        """How many rows of a group may start."""
        return max(0, self._max_started[group] - self._running[group])

    @property
    def keeps_pace(self) -> bool:
        """Whether a short job keeps its pace. With many jobs in the queue, full passes are worth more."""
        return len(self._by_work) <= _FEW

    def _count(self, batch: Batch) -> None:
        ran: set[RowState] = set()
        by_job: dict[Job, list[RowState]] = {}
        for row, _ in batch:
            by_job.setdefault(row.job, []).append(row)
            if not row.started and row not in ran:
                self._running[row.job.group] += 1
                self.waiting -= 1
            ran.add(row)
        stopped = self._ran - ran
        self.preemptions += sum(row.steps_left > 0 and row.job in self._present for row in stopped)
        self._ran = ran
        for job, rows in by_job.items():
            place = bisect_left(self._by_work, _work(job), key=_work)
            job.count(rows)
            self.work.ran(job, len(rows))
            if job.is_done:
                _take_out(self._by_promise, job, _promise)
            if not job.left:
                del self._by_work[place]
            elif place and _work(self._by_work[place - 1]) > _work(job):  # the job has overtaken others
                del self._by_work[place]
                insort(self._by_work, job, key=_work)

    # Stages

    def began(self, stage: Stage, seconds: float, jobs: Collection[Job]) -> None:
        """Note that a stage begins a piece of work, or a batch, of these jobs.

        Args:
            seconds: what the piece takes at most at speed 1.
        """
        self.busy.began(stage, seconds, frozenset(self._present.intersection(jobs)))
        note_orphan(self._by_promise, self.busy)  # the jobs may have left since the piece was chosen

    def ended(self, stage: Stage) -> None:
        """Note that a stage has ended its piece of work, whatever came of it."""
        self.busy.ended(stage)

    def text_encoded(self, job: Job) -> None:
        """Note that one of a job's texts is encoded. A job that is not here is ignored."""
        self._done(job, job.text_encoded)

    def upload_encoded(self, job: Job) -> None:
        """Note that one of a job's uploads is encoded. A job that is not here is ignored."""
        self._done(job, job.upload_encoded)

    def decoded(self, job: Job) -> None:
        """Note that a row of a job is decoded. A job that is not here is ignored."""
        self._done(job, job.decoded)

    def checked(self, job: Job) -> None:
        """Note that an image of a job is checked. A job that is not here is ignored."""
        self._done(job, job.checked)

    def answered(self, job: Job) -> None:
        """Note that a piece of a job's answer is encoded. A job that is not here is ignored."""
        self._done(job, job.answered)

    def _done(self, job: Job, note: Callable[[], None]) -> None:
        """Note that a stage has done a piece of a job. With its last piece, the job leaves."""
        if job not in self._present:
            return
        with self.work.changing(job):
            note()
        if job.is_done:
            _take_out(self._by_promise, job, _promise)
            if not job.unstepped:
                self._present.remove(job)
        self._some_wait = self._some_wait and let_run(self._by_promise, self.work)

    def _follow_costs(self) -> None:
        if self._version != self.machine.version:
            self._version = self.machine.version
            before, self._largest = self._largest, largest_pieces(self.machine)
            follow(self._present, before, self._largest, self.machine)
            self._by_work.sort(key=_work)


def _work(job: Job) -> tuple[float, float]:
    return job.work, job.number


def _promise(job: Job) -> tuple[float, float]:
    return job.promise, job.number


def _take_out(line: list[Job], job: Job, key: Callable[[Job], tuple[float, float]]) -> None:
    place = bisect_left(line, key(job), key=key)
    assert line[place] is job
    del line[place]
