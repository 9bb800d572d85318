"""The engine: one thread that owns the model. Schedule, run, advance; then again.

A request is a job of one or more rows. `submit` returns a Future; cancelling it takes the job's rows out of the batch
before the next step. The engine knows nothing of HTTP or asyncio, and sees the model as a model.rows.Runner.
"""

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, NamedTuple, Protocol

import numpy as np

from model.rows import Forward, Image, Row, Runner
from service.errors import ComputationFailed, DeadlinePassed, Draining, Failed, Loading, QueueFull, ServiceError
from service.scheduler import Scheduler, Task

log = logging.getLogger(__name__)

Status = Literal["loading", "ready", "draining", "failed"]
Clock = Callable[[], float]

_IN_DOUBT_AFTER = 10.0  # seconds without a forward pass that worked
_SMOOTHING = 0.1  # of measured seconds per pass


class Finished(NamedTuple):
    """What a job's Future gives: its images, [C, H, W] each, and the seconds it waited and ran."""

    images: list[Image]
    queue_s: float
    denoise_s: float


class Observer(Protocol):
    """Is told what happens, from the engine's thread."""

    def pass_done(self, rows: int, seconds: float) -> None: ...
    def job_started(self, queue_s: float) -> None: ...
    def job_finished(self, images: int) -> None: ...
    def job_cancelled(self, reason: str) -> None: ...


@dataclass(eq=False)
class _Job:
    rows: Sequence[Row]
    submitted: float
    deadline: float
    is_probe: bool = False
    future: Future[Finished] = field(default_factory=Future)
    started: float | None = None
    images: dict[int, Image] = field(default_factory=dict)  # by index of the row
    tasks: list["_RowTask"] = field(default_factory=list)


class _RowTask(Task):
    """A row in line: which of its job's rows it is, and its slot once it runs."""

    __slots__ = ("index", "job", "slot")

    def __init__(self, job: _Job, index: int) -> None:
        row = job.rows[index]
        super().__init__(len(row.table), row.forwards_per_step)
        self.job = job
        self.index = index
        self.slot: int | None = None


class Engine:
    """Runs jobs on a runner.

    Args:
        runner: the model. Only the engine's thread calls it.
        probe: a row that shows that the model works, for the warm-up and for readiness.
        max_queue: jobs accepted and not finished.
        observer: is told of passes and jobs.
        clock: seconds, never falling.
    """

    def __init__(
        self, runner: Runner, probe: Row, max_queue: int, observer: Observer, clock: Clock = time.monotonic
    ) -> None:
        self._runner = runner
        self._probe = probe
        self._max_queue = max_queue
        self._observer = observer
        self._clock = clock
        self._scheduler: Scheduler[_RowTask] = Scheduler(runner.widths[-1])
        self._inbox: SimpleQueue[_Job | None] = SimpleQueue()
        self._deadlines: list[tuple[float, int, _Job]] = []
        self._count = itertools.count()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._seconds: dict[int, float] = {}  # of a pass, by width

        self._state = threading.Condition()  # guards what follows
        self._jobs: set[_Job] = set()
        self._warm = False
        self._draining = False
        self._stopped = False
        self._last_pass_worked = True
        self._last_success = clock()

    # What other threads call.

    def start(self) -> None:
        """Start the thread, which warms the model up and then takes jobs."""
        self._thread.start()

    def submit(self, rows: Sequence[Row], timeout_s: float) -> Future[Finished]:
        """Accept a job.

        The Future's exception, if it has one, is a ServiceError.

        Raises:
            Unavailable: where the queue is full, or the engine is loading, draining or dead.
        """
        now = self._clock()
        job = _Job(rows, submitted=now, deadline=now + timeout_s)
        with self._state:
            if self._draining:
                raise Draining("the server is shutting down", retry_after=1)
            if self._stopped:
                raise _dead()
            if not self._warm:
                raise Loading("the model is being loaded", retry_after=2)
            if sum(not job.is_probe for job in self._jobs) >= self._max_queue:
                raise QueueFull(f"all {self._max_queue} places of the queue are taken", retry_after=self.backlog_s)
            self._jobs.add(job)
        self._send(job)
        return job.future

    def probe(self) -> Future[Finished]:
        """Run the probe as a job of its own, which needs no place in the queue."""
        now = self._clock()
        job = _Job([self._probe], submitted=now, deadline=float("inf"), is_probe=True)
        with self._state:
            if self._stopped:
                raise _dead()
            self._jobs.add(job)
        self._send(job)
        return job.future

    def drain(self) -> None:
        """Refuse new jobs from now on."""
        with self._state:
            self._draining = True

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no job is left. False where that takes longer than `timeout_s`."""
        with self._state:
            return self._state.wait_for(lambda: not self._jobs, timeout_s)

    def close(self) -> None:
        """Stop the thread after its present pass. Jobs that are not finished fail as Draining."""
        self.drain()
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def status(self) -> Status:
        with self._state:
            if self._draining:
                return "draining"
            if self._stopped or not self._last_pass_worked:
                return "failed"
            return "ready" if self._warm else "loading"

    @property
    def in_doubt(self) -> bool:
        """Whether no recent forward pass is known to have worked: the last failed, or was long ago."""
        with self._state:
            return not self._last_pass_worked or self._clock() - self._last_success > _IN_DOUBT_AFTER

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that forward passes run at."""
        return self._runner.widths

    @property
    def rows_running(self) -> int:
        return self._scheduler.running

    @property
    def rows_waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def outstanding_row_steps(self) -> int:
        """Forward rows still to run."""
        return self._scheduler.outstanding

    @property
    def seconds_per_step(self) -> dict[int, float]:
        """Measured seconds of a forward pass, by its width."""
        return dict(self._seconds)

    @property
    def backlog_s(self) -> float:
        """The seconds that all accepted work will take, as measured so far."""
        width, seconds = max(self.seconds_per_step.items(), default=(1, 0.0))
        return self._scheduler.outstanding / width * seconds

    # What the engine's thread does.

    def _main(self) -> None:
        try:
            self._warm_up()
            while self._receive():
                batch = self._schedule()
                if batch and self._run(batch):
                    self._advance(batch)
        except Exception:
            log.exception("the engine died")
        finally:
            with self._state:
                self._stopped = True
                left = list(self._jobs)
                draining = self._draining
            error = Draining("the server shut down before this was done") if draining else _dead()
            for job in left:
                self._forget(job)
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)

    def _warm_up(self) -> None:
        """Run the probe until a pass costs what it will cost."""
        for _ in range(2):
            slot = self._runner.admit(self._probe)
            for _ in range(len(self._probe.table)):
                self._pass([Forward(slot, 0)])
            image = self._runner.read(slot).x
            self._runner.release(slot)
            if not np.isfinite(image).all():
                raise ComputationFailed("the probe's image is not finite")
        with self._state:
            self._warm = True

    def _send(self, job: _Job) -> None:
        # A cancelled job is sent a second time, which takes it out; this also wakes an engine that is idle. The Future,
        # which holds the images, must not hold its job too: such circles wait long for the garbage collector.
        known = weakref.ref(job)

        def send_again(future: Future[Finished]) -> None:
            if future.cancelled() and (cancelled := known()) is not None:
                self._inbox.put(cancelled)

        job.future.add_done_callback(send_again)
        self._inbox.put(job)

    def _receive(self) -> bool:
        """Take in what was sent; wait for it where nothing else is to be done. False when it is time to stop."""
        while True:
            idle = not self._scheduler.outstanding
            if not idle and self._inbox.empty():
                break
            job = self._inbox.get()
            if job is None:
                return False
            if job.future.cancelled():
                if self._leave(job):
                    self._tell_cancelled(job, "disconnect")
            else:
                self._enter(job)
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, _, job = heapq.heappop(self._deadlines)
            if not job.future.done():
                self._fail(job, DeadlinePassed(f"not done within {job.deadline - job.submitted:g} s"), "timeout")
        return True

    def _enter(self, job: _Job) -> None:
        job.tasks = [_RowTask(job, index) for index in range(len(job.rows))]
        self._scheduler.add(job.tasks)
        heapq.heappush(self._deadlines, (job.deadline, next(self._count), job))

    def _leave(self, job: _Job) -> bool:
        """Forget a job, wherever its rows are. False where that has been done."""
        self._scheduler.remove(job.tasks)
        for task in job.tasks:
            if task.slot is not None:
                self._runner.release(task.slot)
                task.slot = None
        job.tasks = []
        return self._forget(job)

    def _forget(self, job: _Job) -> bool:
        """Give back a job's place in the queue. False where that has been done."""
        with self._state:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            if len(self._deadlines) > 2 * len(self._jobs):  # of jobs that are gone, with their images
                self._deadlines = [entry for entry in self._deadlines if entry[2] in self._jobs]
                heapq.heapify(self._deadlines)
            self._state.notify_all()
            return True

    def _schedule(self) -> list[tuple[_RowTask, int]]:
        """Choose the next pass's rows, and give those that start a slot."""
        batch = self._scheduler.next_batch()
        now = self._clock()
        for task, _ in batch:
            job = task.job
            if task.slot is None and not job.future.done():
                try:
                    task.slot = self._runner.admit(job.rows[task.index])
                except Exception:
                    log.exception("a row could not be admitted")
                    self._fail(job, ComputationFailed("this request could not be started"))
                    continue
            if task.slot is not None and job.started is None:
                job.started = now
                if not job.is_probe:
                    self._observer.job_started(now - job.submitted)
        return [(task, branch) for task, branch in batch if task.slot is not None]

    def _run(self, batch: Sequence[tuple[_RowTask, int]]) -> bool:
        """Run the pass. Where it raises, the jobs in it fail, and the others go on."""
        try:
            self._pass([Forward(task.slot, branch) for task, branch in batch if task.slot is not None])
        except Exception:
            log.exception("a forward pass failed")
            with self._state:
                self._last_pass_worked = False
            for job in dict.fromkeys(task.job for task, _ in batch):
                self._fail(job, ComputationFailed("a forward pass of this request failed"))
            return False
        return True

    def _advance(self, batch: Sequence[tuple[_RowTask, int]]) -> None:
        """Count the steps, collect finished images, and answer finished jobs."""
        for task in self._scheduler.advance(batch):
            job = task.job
            if task.slot is None:  # another row of its job failed in this pass
                continue
            image = self._runner.read(task.slot).x
            self._runner.release(task.slot)
            task.slot = None
            if not np.isfinite(image).all():
                self._fail(job, ComputationFailed("the image has values that are not finite"))
                continue
            job.images[task.index] = image
            if len(job.images) == len(job.rows):
                self._finish(job)

    def _pass(self, forwards: Sequence[Forward]) -> None:
        began = self._clock()
        self._runner.step(forwards)
        now = self._clock()
        seconds = now - began
        width = next(width for width in self._runner.widths if width >= len(forwards))
        known = self._seconds.get(width)
        # The first passes of a width also build kernels: only what follows them is smoothed.
        self._seconds[width] = seconds if known is None or not self._warm else known + _SMOOTHING * (seconds - known)
        self._observer.pass_done(len(forwards), seconds)
        with self._state:
            self._last_pass_worked = True
            self._last_success = now

    def _finish(self, job: _Job) -> None:
        self._leave(job)
        started = job.submitted if job.started is None else job.started
        images = [job.images.pop(index) for index in range(len(job.rows))]
        finished = Finished(images, started - job.submitted, self._clock() - started)
        if not job.future.set_running_or_notify_cancel():
            self._tell_cancelled(job, "disconnect")
            return
        try:
            if not job.is_probe:
                self._observer.job_finished(len(images))  # ahead of the answer: whoever has it finds it counted
        finally:
            job.future.set_result(finished)

    def _fail(self, job: _Job, error: ServiceError, reason: str | None = None) -> None:
        self._leave(job)
        if not job.future.set_running_or_notify_cancel():
            self._tell_cancelled(job, "disconnect")
            return
        try:
            if reason is not None:
                self._tell_cancelled(job, reason)
        finally:
            job.future.set_exception(error)

    def _tell_cancelled(self, job: _Job, reason: str) -> None:
        if not job.is_probe:
            self._observer.job_cancelled(reason)


def _dead() -> Failed:
    return Failed("the engine has stopped", retry_after=30)
