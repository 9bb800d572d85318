"""The requests that are accepted and not finished. Any thread may put one in or take one out.

A request's rows are a job in the scheduler's line. It comes in with a promise, and leaves once: done, failed, late or
cancelled.
"""

import heapq
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple, Protocol

from model.rows import Image, Row
from service.engine.arrivals import Arrivals
from service.engine.costs import Costs
from service.engine.eta import eta
from service.engine.fairness import Places
from service.engine.jobs import Job, Task
from service.engine.promises import seconds_alone
from service.engine.scheduler import Scheduler
from service.errors import (
    DeadlinePassed,
    Draining,
    Failed,
    Invalid,
    Loading,
    QueueFull,
    ServiceError,
    ShareTaken,
    TooLate,
    Unavailable,
)

Clock = Callable[[], float]

_LOOK_FOR = 60.0  # seconds at most, in which an idle engine looks whether passes have become faster

REFUSALS: dict[type[ServiceError], str] = {
    Invalid: "impossible",
    TooLate: "late",
    ShareTaken: "share",
    QueueFull: "full",
    Loading: "loading",
    Draining: "draining",
    Failed: "failed",
}


class Finished(NamedTuple):
    """What a request's Future gives: its images, [C, H, W] each, and the seconds it waited, ran and was decoded.

    Decoding counts from the last step of its last image on: 0 where nothing is decoded.
    """

    images: list[Image]
    queue_s: float
    denoise_s: float
    decode_s: float = 0.0


class Accepted(NamedTuple):
    """A request in line.

    Attributes:
        future: of its images. The exception, if it has one, is a ServiceError. Cancelling it takes the request out.
        position: the jobs that are to go first, as things stand.
        eta_s: the expected seconds until it is done.
        promise_s: the seconds until it will be done, whatever comes later.
    """

    future: Future[Finished]
    position: int
    eta_s: float
    promise_s: float


class Watcher(Protocol):
    """Follows a request, from the engine's threads, which it may not hold up."""

    @property
    def preview_every(self) -> int:
        """Steps from one preview of a row to its next; 0 for none."""

    def progress(self, step: int, steps: int, eta_s: float) -> None:
        """The slowest row has taken so many of its steps."""

    def preview(self, index: int, step: int, x0: Image) -> None:
        """What row `index` is expected to become."""

    def image(self, index: int, image: Image) -> None:
        """Row `index` is done."""


class Observer(Protocol):
    """Is told what becomes of requests."""

    def request_accepted(self) -> None: ...
    def request_refused(self, reason: str) -> None: ...
    def request_started(self, queue_s: float) -> None: ...
    def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None: ...
    def request_cancelled(self, reason: str) -> None: ...


@dataclass(eq=False)
class Request:
    """What the engine knows of a request.

    Attributes:
        client: who asks; None for the engine's own probe, which no observer is told of.
        stepped: when the last row that has taken its steps, to be decoded, had done so.
        slots: of its rows that have started and are not done.
        images: those that are done, by index of their row.
    """

    rows: Sequence[Row]
    job: Job
    submitted: float
    deadline: float
    client: str | None = None
    watcher: Watcher | None = None
    future: Future[Finished] = field(default_factory=Future)
    eta_s: float = 0.0
    started: float | None = None
    stepped: float | None = None
    slots: dict[Task, int] = field(default_factory=dict)
    images: dict[int, Image] = field(default_factory=dict)


class Requests:
    """Those in line.

    Args:
        places: for those who ask.
        observer: is told of each.
        clock: seconds, never falling.

    Attributes:
        changed: guards all of this, and is notified when it changes.
        scheduler: the line; None until it is known what passes cost.
        arrivals: what was accepted lately.
        slow_until: when the last of those may come again who were refused for the present speed of passes alone.
        abandoned: slots of rows that have left, for the engine to release.
    """

    def __init__(self, places: Places, observer: Observer, clock: Clock) -> None:
        self._observer = observer
        self._clock = clock
        self._count = itertools.count()
        self.changed = threading.Condition()
        self.scheduler: Scheduler | None = None
        self.arrivals = Arrivals(clock())
        self.slow_until = -inf
        self.abandoned: list[int] = []
        self._closed: Callable[[], Unavailable] | None = loading  # why nothing is accepted
        self._places = places
        self._by_job: dict[Job, Request] = {}
        self._deadlines: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._by_job)

    def of(self, job: Job) -> Request | None:
        """The request of a job; None where it has left."""
        return self._by_job.get(job)

    # Coming in

    def open(self, scheduler: Scheduler) -> None:
        """Accept from now on, unless the server is leaving."""
        with self.changed:
            self.scheduler = scheduler
            if self._closed is not draining:
                self._closed = None
            self.changed.notify_all()

    def close(self, why: Callable[[], Unavailable]) -> None:
        """Accept nothing from now on."""
        with self.changed:
            if self._closed is not draining:
                self._closed = why
            self.changed.notify_all()

    def accept(self, rows: Sequence[Row], timeout_s: float, client: str, watcher: Watcher | None) -> Accepted:
        """Put a request in line. Raises as Engine.submit says."""
        with self.changed:
            now = self._clock()
            with self._counting_refusals():
                scheduler = self.check_open()
                self._check_places(client, scheduler)
                job = _job_of(rows, scheduler.costs)
                self._check_possible(rows, job, scheduler, timeout_s)
                promise = _promise(job, scheduler, now, timeout_s)
            request = Request(rows, job, now, now + timeout_s, client, watcher)
            self._places.take(client)
            self._enter(request, scheduler, promise)
            request.eta_s = eta(job, scheduler, self.arrivals, now)
            self.arrivals.note(job.size, now)
            self._observer.request_accepted()
            return Accepted(request.future, scheduler.ahead_of(job), request.eta_s, promise - now)

    def accept_probe(self, row: Row) -> Future[Finished]:
        """Put the engine's own probe in line, also while nothing else is accepted. Raises where it is still loading."""
        with self.changed:
            if self.scheduler is None:
                raise (self._closed or loading)()
            request = Request([row], _job_of([row], self.scheduler.costs), self._clock(), inf)
            self._enter(request, self.scheduler, inf)
            return request.future

    def check_possible(self, rows: Sequence[Row], timeout_s: float) -> None:
        """Refuse what could not be done in time even alone, before there is all of it. Raises as Engine.submit says."""
        with self.changed, self._counting_refusals():
            scheduler = self.check_open()
            self._check_possible(rows, _job_of(rows, scheduler.costs), scheduler, timeout_s)

    def _check_possible(self, rows: Sequence[Row], job: Job, scheduler: Scheduler, timeout_s: float) -> None:
        """Refuse what could not be done in time even alone: for good only where the best speed would not do either."""
        alone_s = scheduler.seconds_alone(job)
        if alone_s <= timeout_s:
            return
        best = scheduler.costs.best
        at_best_s = seconds_alone(_job_of(rows, best), best)
        if at_best_s > timeout_s:
            needed = f"must be at least {at_best_s:.3g} for this, even on an idle server, and is {timeout_s:g}"
            raise Invalid.field("timeout_s", needed)
        missing_s = alone_s - timeout_s
        self.slow_until = max(self.slow_until, self._clock() + min(missing_s, _LOOK_FOR))
        message = f"this cannot be done within {timeout_s:g} s now, but within {alone_s:.3g} s"
        raise TooLate(f"{message}: the machine is slower than it was", missing_s)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ServiceError as error:
            self._observer.request_refused(REFUSALS[type(error)])
            raise

    def check_open(self) -> Scheduler:
        """The line, while requests are accepted. Raises Unavailable where they are not."""
        if self._closed is not None or self.scheduler is None:
            raise (self._closed or loading)()
        return self.scheduler

    def _check_places(self, client: str, scheduler: Scheduler) -> None:
        refusal = self._places.refusal(client)
        a_place_s = scheduler.backlog_s / max(1, self._places.taken)  # until one is free, roughly
        if refusal == "share":
            raise ShareTaken("the queue is full, and you hold your share of its places", a_place_s)
        if refusal == "full":
            raise QueueFull(f"all {self._places.taken} places of the queue are taken", a_place_s)

    def _enter(self, request: Request, scheduler: Scheduler, promise: float) -> None:
        self._by_job[request.job] = request
        scheduler.add(request.job, promise)
        heapq.heappush(self._deadlines, (request.deadline, next(self._count), request))
        # The Future, which holds the images, must not hold its request too: such circles wait long for the garbage
        # collector.
        known = weakref.ref(request)

        def leave(future: Future[Finished]) -> None:
            if future.cancelled() and (cancelled := known()) is not None and self.leave(cancelled):
                self._tell_cancelled(cancelled, "disconnect")

        request.future.add_done_callback(leave)
        self.changed.notify_all()

    # Going out

    def leave(self, request: Request) -> bool:
        """Forget a request, wherever its rows are. False where that has been done."""
        with self.changed:
            if self._by_job.pop(request.job, None) is None:
                return False
            if self.scheduler is not None:
                self.scheduler.remove(request.job)
            self.abandoned += request.slots.values()
            request.slots.clear()
            if request.client is not None:
                self._places.give_back(request.client)
            if len(self._deadlines) > 2 * len(self._by_job):  # of requests that are gone, with their images
                self._deadlines = [entry for entry in self._deadlines if entry[2].job in self._by_job]
                heapq.heapify(self._deadlines)
            self.changed.notify_all()
            return True

    def start(self, request: Request, task: Task, slot: int, now: float) -> bool:
        """Note the slot of a row that starts. False where its request has left."""
        with self.changed:
            if request.job not in self._by_job:
                self.abandoned.append(slot)
                return False
            request.slots[task] = slot
        if request.started is None:
            request.started = now
            if request.client is not None:
                self._observer.request_started(now - request.submitted)
        return True

    def take_out_late(self, now: float) -> list[Request]:
        """Those whose deadline has passed. They have left, and are to be answered."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            if self.leave(request):
                late.append(request)
        return late

    def finish(self, request: Request) -> None:
        """Answer a request whose images are all there."""
        if not self.leave(request):
            return
        now = self._clock()
        started = request.submitted if request.started is None else request.started
        images = [request.images.pop(index) for index in range(len(request.rows))]
        stepped = now if request.stepped is None else request.stepped
        finished = Finished(images, started - request.submitted, stepped - started, now - stepped)
        if not request.future.set_running_or_notify_cancel():
            self._tell_cancelled(request, "disconnect")
            return
        try:
            if request.client is not None:  # ahead of the answer: whoever has it finds it counted
                kept = now <= request.job.promise
                self._observer.request_finished(finished, kept, request.eta_s, now - request.submitted)
        finally:
            request.future.set_result(finished)

    def fail(self, request: Request, error: ServiceError, reason: str = "failed") -> None:
        """Take a request out and answer it with an error."""
        if self.leave(request):
            self.answer(request, error, reason)

    def answer_late(self, late: Iterable[Request]) -> None:
        """Tell those whose deadline has passed, and who have left."""
        for request in late:
            message = f"not done within {request.deadline - request.submitted:g} s"
            self.answer(request, DeadlinePassed(message), "timeout")

    def fail_all(self, error: Callable[[], ServiceError], reason: str = "failed") -> None:
        with self.changed:
            left = list(self._by_job.values())
        for request in left:
            self.fail(request, error(), reason)

    def answer(self, request: Request, error: ServiceError, reason: str) -> None:
        """Answer a request that has left with an error."""
        cancelled = not request.future.set_running_or_notify_cancel()
        try:
            self._tell_cancelled(request, "disconnect" if cancelled else reason)
        finally:
            if not cancelled:
                request.future.set_exception(error)

    def _tell_cancelled(self, request: Request, reason: str) -> None:
        if request.client is not None:
            self._observer.request_cancelled(reason)


def loading() -> Loading:
    return Loading("the model is being loaded", retry_after=2)


def draining() -> Draining:
    return Draining("the server is shutting down", retry_after=1)


def dead() -> Failed:
    return Failed("the engine has stopped", retry_after=30)


def stuck() -> Failed:
    return Failed("a forward pass does not return", retry_after=30)


def _job_of(rows: Sequence[Row], costs: Costs) -> Job:
    decoded = costs.decoding is not None and rows[0].is_decoded  # rows of one request are all alike in this
    return Job(((len(row.table), row.forwards_per_step) for row in rows), costs, decoded)


def _promise(job: Job, scheduler: Scheduler, now: float, timeout_s: float) -> float:
    latest = now + timeout_s
    promise = scheduler.earliest_promise(job, now, latest)
    if promise > latest:
        message = f"this cannot be done within {timeout_s:g} s now, but within {promise - now:.3g} s"
        raise TooLate(message, promise - latest)
    return promise
