"""Chooses the rows of the next pass. Pure Python: no torch, no asyncio, no clock.

The jobs with the least work left go first, so short requests overtake long ones. Shortest-first uses up the spare time
of the plans in promises.py. When no time is left, the scheduler follows a plan: jobs go in the order of promises.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from math import inf

from service.engine.costs import Costs
from service.engine.jobs import Batch, Job, RowState
from service.engine.promises import Bounds, spare

_MUCH_LONGER = 4.0  # times the work left of another job
_KEEPS_PACE = 1.25  # times the seconds of a pass
_FEW = 8  # jobs


class Scheduler:
    """The jobs, ordered by work and by promise.

    Args:
        costs: of passes.
        max_started: while this many rows run, another row starts only to keep a promise.

    Attributes:
        running: rows that have started and have steps left.
        waiting: rows that have not started.
        outstanding: forward rows still to run, without those of the present pass.
        undecoded: rows still to be decoded.
        decoding: undecoded rows that have ended their last step.
        preemptions: how often a row with steps left ran in a pass and not in the next.
        busy_until: the end of the present pass at the latest, margin included.
    """

    def __init__(self, costs: Costs, max_started: int) -> None:
        self.costs = costs
        self.running = self.waiting = self.outstanding = self.undecoded = self.decoding = self.preemptions = 0
        self.busy_until = -inf
        self._max_started = max_started
        self._version = costs.version
        self._arrived = 0
        self._present: set[Job] = set()
        self._by_work: list[Job] = []  # jobs with forward rows left
        self._by_promise: list[Job] = []  # jobs with forward rows left, or with rows left to decode
        self._ran: set[RowState] = set()  # rows of the last pass

    @property
    def by_promise(self) -> Sequence[Job]:
        """The jobs with forward rows left to run or rows left to decode, the earliest promise first."""
        self._follow_costs()
        return self._by_promise

    def add(self, job: Job, promise: float) -> None:
        """Add a job."""
        self._arrived += 1
        job.number, job.promise = self._arrived, promise
        self._present.add(job)
        insort(self._by_work, job, key=_work)
        insort(self._by_promise, job, key=_promise)
        self.waiting += len(job.rows)
        self.outstanding += job.left
        self.undecoded += job.undecoded

    def remove(self, job: Job) -> None:
        """Take a job out, whatever part of it has run. A job that is not here is ignored."""
        if job not in self._present:
            return
        self._present.remove(job)
        if job.left:
            _take_out(self._by_work, job, _work)
        if job.left or job.undecoded:
            _take_out(self._by_promise, job, _promise)
        if job.undecoded:
            self.undecoded -= job.undecoded
            self.decoding -= job.undecoded - job.unstepped
        started = sum(row.started for row in job.rows if not row.stepped)
        self.running -= started
        self.waiting -= job.unstepped - started
        self.outstanding -= job.left

    def ahead_of(self, job: Job) -> int:
        """How many jobs have less work left, or as much work and an earlier arrival."""
        return bisect_left(self._by_work, _work(job), key=_work)

    @property
    def backlog_s(self) -> float:
        """The seconds of all work in the queue."""
        decoding = self.costs.decoding
        images = 0.0 if decoding is None else self.undecoded * decoding.seconds_per_row
        return self.outstanding * self.costs.seconds_per_row + images

    @property
    def by_work(self) -> Sequence[Job]:
        """The jobs with forward rows left, the least work first."""
        return self._by_work

    def next_batch(self, now: float) -> Batch:
        """Choose the forward rows of the pass that begins now, and count them as run."""
        self._follow_costs()
        batch = self.choose(now)
        if batch:
            self.busy_until = now + self._at_most(batch)
        self._count(batch)
        return batch

    def advance(self, batch: Batch) -> list[RowState]:
        """End a pass. Returns the rows of present jobs that took their last step. They leave, or are decoded next."""
        self.busy_until = -inf
        finished = [row for row in dict.fromkeys(row for row, _ in batch) if not row.steps_left]
        finished = [row for row in finished if row.job in self._present]
        for row in finished:
            row.job.end(row)
            self.running -= 1
            if row.job.undecoded:
                self.decoding += 1
            elif not row.job.unstepped:
                self._present.remove(row.job)
        return finished

    def decoded(self, job: Job) -> None:
        """Note that a row of a job is decoded. With its last row, the job leaves. A job that is not here is ignored."""
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
        """The least work first, up to the width that pays, or narrower if a wide pass would slow a short job."""
        batch: Batch = []
        limit = self.costs.width
        may_start = max(0, self._max_started - self.running)
        for job in self._by_work:
            if batch and self.keeps_pace:
                limit = pace_limit(self.costs, limit, len(batch), batch[0][0].job.left, job.left)
            may_start -= fill(batch, job, limit, may_start)
            if len(batch) >= limit:
                break
        return batch

    @property
    def keeps_pace(self) -> bool:
        """Whether a short job keeps its pace. With many jobs in the queue, full passes are worth more."""
        return len(self._by_work) <= _FEW

    def _filled(self) -> Batch:
        """The next pass of the plan `together`."""
        batch: Batch = []
        for job in self._by_promise:
            fill(batch, job, self.costs.width, len(job.rows))
            if len(batch) >= self.costs.width:
                break
        return batch

    def _first_alone(self) -> Batch:
        """The next pass of the plan `alone`."""
        rows = next(job for job in self._by_promise if job.left).furthest_behind()
        return [(row, branch) for row in rows for branch in row.branches][: self.costs.width]

    def _count(self, batch: Batch) -> None:
        ran: set[RowState] = set()
        starting: set[RowState] = set()
        by_job: dict[Job, list[RowState]] = {}
        for row, _ in batch:
            ran.add(row)
            by_job.setdefault(row.job, []).append(row)
            if not row.started:
                starting.add(row)
        self.running += len(starting)
        self.waiting -= len(starting)
        stopped = self._ran - ran
        self.preemptions += sum(row.steps_left > 0 and row.job in self._present for row in stopped)
        self._ran = ran
        self.outstanding -= len(batch)
        for job, rows in by_job.items():
            place = bisect_left(self._by_work, _work(job), key=_work)
            if job.left == len(rows) and not job.undecoded:
                _take_out(self._by_promise, job, _promise)
            job.count(rows, self.costs)
            if not job.left:
                del self._by_work[place]
            elif place and _work(self._by_work[place - 1]) > _work(job):  # the job has overtaken others
                del self._by_work[place]
                insort(self._by_work, job, key=_work)

    def _at_most(self, batch: Batch) -> float:
        return Bounds(self.costs).alone(self.costs.ceilings[len(batch)])

    def _follow_costs(self) -> None:
        if self._version != self.costs.version:
            self._version = self.costs.version
            for job in self._present:
                job.weigh(self.costs)


def pace_limit(costs: Costs, limit: int, rows: int, least: float, left: float) -> int:
    """How wide a pass with `rows` may become, if the next job has `left` forward rows and the first job the `least`."""
    if left > _MUCH_LONGER * least:
        ceilings = costs.ceilings
        while limit > rows and ceilings[limit] > _KEEPS_PACE * ceilings[rows]:
            limit -= 1
    return limit


def _work(job: Job) -> tuple[int, float]:
    return job.left, job.number


def _promise(job: Job) -> tuple[float, float]:
    return job.promise, job.number


def _take_out(line: list[Job], job: Job, key: Callable[[Job], tuple[float, float]]) -> None:
    place = bisect_left(line, key(job), key=key)
    assert line[place] is job
    del line[place]


def fill(batch: Batch, job: Job, limit: int, may_start: int) -> int:
    """Fill the room of a batch with forward rows of a job. Returns how many rows start."""
    starting = 0
    for row in job.behind_first():
        if len(batch) >= limit:
            break
        if not row.started:
            if starting == may_start:
                continue
            starting += 1
        batch += [(row, branch) for branch in row.branches[: limit - len(batch)]]
    return starting
