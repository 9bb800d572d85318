"""Which rows run at the next pass. Pure Python: no torch, no asyncio, no clock.

The jobs with the least work left go first, so that short requests overtake long ones. That spends the time which the
plans of promises.py have to spare; when it is spent, a plan is followed, and the earliest promise goes first.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from math import inf

from service.engine.costs import Costs
from service.engine.jobs import Batch, Job, Task
from service.engine.promises import Bounds, earliest, patient, seconds_alone, spare

_MUCH_LONGER = 4.0  # times the work left
_KEEPS_PACE = 1.25  # times the seconds of a pass
_FEW = 8  # jobs; with more in line, full passes are worth more than a short job's pace


class Scheduler:
    """The line of jobs.

    Args:
        costs: of passes.
        max_started: while so many tasks hold a slot, no other starts, but for a promise.

    Attributes:
        running: tasks that have started and are not done.
        waiting: tasks that have not started.
        outstanding: forward rows still to run, without those of the present pass.
        undecoded: images still to be decoded.
        decoding: those of them that have taken all their steps.
        preemptions: tasks that ran in a pass and, with steps left, not in the next; so far.
        busy_until: when the present pass will have ended, with the margin.
    """

    def __init__(self, costs: Costs, max_started: int) -> None:
        self.costs = costs
        self.running = self.waiting = self.outstanding = self.undecoded = self.decoding = self.preemptions = 0
        self.busy_until = -inf
        self._max_started = max_started
        self._version = costs.version
        self._arrived = 0
        self._present: set[Job] = set()
        self._by_work: list[Job] = []  # those with something left to run
        self._by_promise: list[Job] = []  # and also those with something left to decode
        self._ran: set[Task] = set()  # in the last pass

    def seconds_alone(self, job: Job) -> float:
        """The earliest promise, in seconds, on an idle server."""
        return seconds_alone(job, self.costs)

    def earliest_promise(self, job: Job, now: float, latest: float) -> float:
        """The earliest time that can be promised: a patient one, if `latest` allows; if it must be, a later one.

        Of jobs of one size none is promised to be done before those that are here already.
        """
        self._follow_costs()
        promised = (other for other in self._by_promise if other.promise < inf)  # the engine's probe is not
        equals = (other.promise for other in promised if other.size == job.size)
        wanted = min(latest, max([now + patient(job, self.outstanding, self.costs, self.undecoded), *equals]))
        return earliest(job, self._by_promise, self.costs, max(now, self.busy_until), wanted)

    def add(self, job: Job, promise: float) -> None:
        """Put a job in line."""
        self._arrived += 1
        job.number, job.promise = self._arrived, promise
        self._present.add(job)
        insort(self._by_work, job, key=_work)
        insort(self._by_promise, job, key=_promise)
        self.waiting += len(job.tasks)
        self.outstanding += job.left
        self.undecoded += job.undecoded

    def remove(self, job: Job) -> None:
        """Take a job out of the line, whatever of it has run. One that is not in it is ignored."""
        if job not in self._present:
            return
        self._present.remove(job)
        if job.left:
            _take_out(self._by_work, job, _work)
        if job.left or job.undecoded:
            _take_out(self._by_promise, job, _promise)
        if job.undecoded:
            self.undecoded -= job.undecoded
            self.decoding -= job.undecoded - len(job.tasks)
        started = sum(task.started for task in job.tasks)
        self.running -= started
        self.waiting -= len(job.tasks) - started
        self.outstanding -= job.left

    def ahead_of(self, job: Job) -> int:
        """How many jobs have less work left, or as much and came before."""
        return bisect_left(self._by_work, _work(job), key=_work)

    @property
    def backlog_s(self) -> float:
        """The seconds that all work in line will take."""
        decoding = self.costs.decoding
        images = 0.0 if decoding is None else self.undecoded * decoding.seconds_per_row
        return self.outstanding * self.costs.seconds_per_row + images

    @property
    def by_work(self) -> Sequence[Job]:
        """The jobs with something left to run, those with the least first."""
        return self._by_work

    def next_batch(self, now: float) -> Batch:
        """Choose the forward rows of the pass that begins now, and count them as run."""
        self._follow_costs()
        batch = self.choose(now)
        if batch:
            self.busy_until = now + self._at_most(batch)
        self._count(batch)
        return batch

    def advance(self, batch: Batch) -> list[Task]:
        """After a pass: the tasks that it finished and whose jobs are still here. They leave, or are to be decoded."""
        self.busy_until = -inf
        finished = [task for task in dict.fromkeys(task for task, _ in batch) if not task.steps_left]
        finished = [task for task in finished if task.job in self._present]
        for task in finished:
            task.job.tasks.remove(task)
            self.running -= 1
            if task.job.undecoded:
                self.decoding += 1
            elif not task.job.tasks:
                self._present.remove(task.job)
        return finished

    def decoded(self, job: Job) -> None:
        """An image of a job has been decoded. With its last one the job leaves. One that is not here is ignored."""
        if job not in self._present:
            return
        job.undecoded -= 1
        self.undecoded -= 1
        self.decoding -= 1
        if not job.undecoded:
            _take_out(self._by_promise, job, _promise)
            self._present.remove(job)

    def choose(self, now: float) -> Batch:
        """The forward rows of the pass that begins now."""
        batch = self._shortest_first()
        if not batch:
            return batch
        left = spare(self._by_promise, self.costs, now)
        if max(left) >= self._at_most(batch):
            return batch
        return self._filled() if left.together >= left.alone else self._first_alone()

    def _shortest_first(self) -> Batch:
        """The least work left first, up to the width that pays; or less, where that would hold up much shorter jobs."""
        batch: Batch = []
        limit = self.costs.width
        may_start = max(0, self._max_started - self.running)
        for job in self._by_work:
            if batch:
                limit = self.limit(limit, len(batch), batch[0][0].job.left, job.left)
            may_start -= fill(batch, job, limit, may_start)
            if len(batch) >= limit:
                break
        return batch

    def limit(self, limit: int, rows: int, least: float, left: float) -> int:
        """How wide a pass with `rows` may become, if the next to join has `left` to do, and the first the `least`."""
        if left > _MUCH_LONGER * least and len(self._by_work) <= _FEW:
            ceilings = self.costs.ceilings
            while limit > rows and ceilings[limit] > _KEEPS_PACE * ceilings[rows]:
                limit -= 1
        return limit

    def _filled(self) -> Batch:
        """The plan `together`."""
        batch: Batch = []
        for job in self._by_promise:
            fill(batch, job, self.costs.width, len(job.tasks))
            if len(batch) >= self.costs.width:
                break
        return batch

    def _first_alone(self) -> Batch:
        """The plan `alone`."""
        tasks = next(job for job in self._by_promise if job.left).furthest_behind()
        return [(task, branch) for task in tasks for branch in task.branches][: self.costs.width]

    def _count(self, batch: Batch) -> None:
        ran: set[Task] = set()
        by_job: dict[Job, list[Task]] = {}
        for task, _ in batch:
            ran.add(task)
            by_job.setdefault(task.job, []).append(task)
            if not task.started:
                task.started = True
                self.running += 1
                self.waiting -= 1
        stopped = self._ran - ran
        self.preemptions += sum(task.steps_left > 0 and task.job in self._present for task in stopped)
        self._ran = ran
        self.outstanding -= len(batch)
        for job, tasks in by_job.items():
            place = bisect_left(self._by_work, _work(job), key=_work)
            if job.left == len(tasks) and not job.undecoded:
                _take_out(self._by_promise, job, _promise)
            job.count(tasks, self.costs)
            if not job.left:
                del self._by_work[place]
            elif place and _work(self._by_work[place - 1]) > _work(job):  # it has overtaken others
                del self._by_work[place]
                insort(self._by_work, job, key=_work)

    def _at_most(self, batch: Batch) -> float:
        return Bounds(self.costs).alone(self.costs.ceilings[len(batch)])

    def _follow_costs(self) -> None:
        if self._version != self.costs.version:
            self._version = self.costs.version
            for job in self._present:
                job.weigh(self.costs)


def _work(job: Job) -> tuple[int, int]:
    return job.left, job.number


def _promise(job: Job) -> tuple[float, int]:
    return job.promise, job.number


def _take_out(line: list[Job], job: Job, key: Callable[[Job], tuple[float, int]]) -> None:
    place = bisect_left(line, key(job), key=key)
    assert line[place] is job
    del line[place]


def fill(batch: Batch, job: Job, limit: int, may_start: int) -> int:
    """Put forward rows of a job into a batch that has room for them. Returns how many tasks start."""
    starting = 0
    for task in job.behind_first():
        if len(batch) >= limit:
            break
        if not task.started:
            if starting == may_start:
                continue
            starting += 1
        batch += [(task, branch) for branch in task.branches[: limit - len(batch)]]
    return starting
