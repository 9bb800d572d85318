"""The queue: requests that are accepted and not finished. Any thread may add a request or take one out.

A request enters with a promise and leaves once: done, failed, late or cancelled. One lock guards the queue and all else
that the engine's threads share. No thread computes an estimate or calls an observer under the lock.
"""

import heapq
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from math import inf

from model.rows import Group, Row
from service.engine.admission import REFUSALS, Line, admit
from service.engine.arrivals import Arrivals
from service.engine.contexts import Prompts
from service.engine.fairness import Places
from service.engine.jobs import Job, job_of, probe_of
from service.engine.requests import (
    Accepted,
    Clock,
    Encoding,
    Finished,
    Observer,
    Request,
    Upload,
    Watcher,
    draining,
    loading,
)
from service.engine.scheduler import Scheduler
from service.engine.waves import RowState
from service.errors import DeadlinePassed, Draining, Refused, ServiceError, TooLate, Unavailable

_LOOK_FOR = 60.0  # the most seconds for which an idle engine measures whether passes have become faster

_REASONS: dict[type[ServiceError], str] = {Draining: "draining", Refused: "refused"}  # of cancellations, for observers


class Queue:
    """The requests in the queue.

    Args:
        places: for clients.
        observer: hears of each request.
        clock: seconds, never falling.

    Attributes:
        lock: guards all of this.
        changed: a condition on the lock. Notified of each change, except for those that only a stage waits for.
        scheduler: orders the jobs; None until the costs of passes are known.
        arrivals: the jobs accepted lately.
        slow_until: probes measure the speed until this time, after a refusal for the present speed alone.
        abandoned: slots of rows that have left, each with its group, for the runners to release.
        listeners: are called under the lock when a request has left, and when the engine's threads must end.
        stopping: whether the engine's threads must end.
    """

    def __init__(self, places: Places, observer: Observer, clock: Clock) -> None:
        self._observer = observer
        self._clock = clock
        self._count = itertools.count()
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.scheduler: Scheduler | None = None
        self.slow_until = -inf
        self.abandoned: list[tuple[Group, int]] = []
        self.listeners: list[Callable[[], None]] = []
        self.stopping = False
        self.arrivals = Arrivals(clock())
        self._closed: Callable[[], Unavailable] | None = loading  # why requests are refused
        self._places = places
        self._by_job: dict[Job, Request] = {}
        self._deadlines: list[tuple[float, int, weakref.ref[Request]]] = []  # a heap

    def __len__(self) -> int:
        return len(self._by_job)

    def of(self, job: Job) -> Request | None:
        """The request of a job; None if the request has left."""
        return self._by_job.get(job)

    # Coming in

    def open(self, scheduler: Scheduler) -> None:
        """Accept requests from now on, unless the server is draining."""
        with self.lock:
            self.scheduler = scheduler
            if not self.is_draining:
                self._closed = None
            self.changed.notify_all()

    @property
    def is_draining(self) -> bool:
        """Whether the server is draining. Draining never ends."""
        return self._closed is draining

    def close(self, why: Callable[[], Unavailable]) -> None:
        """Refuse requests from now on, with this error."""
        with self.lock:
            if not self.is_draining:
                self._closed = why
            self.changed.notify_all()

    def stop(self) -> None:
        """Make the engine's threads end after their present calls."""
        with self.lock:
            self.stopping = True
            self._tell_all()

    def accept(
        self,
        rows: Sequence[Row],
        timeout_s: float,
        client: str,
        encoding: Encoding | None,
        watcher: Watcher | None,
        upload: Upload | None,
        prompts: Prompts,
    ) -> tuple[Request, Accepted]:
        """Add a request. Raises as Engine.submit says."""
        with self._noting_refusals(), self.lock:
            scheduler, now = self.check_open(), self._clock()
            values = None if encoding is None else encoding.values
            job = job_of(rows, scheduler.machine, values, len(prompts.unknown), len(upload.images if upload else ()))
            admission = admit(job, client, Line(scheduler, self._places, self.arrivals), now, timeout_s)
            until, ahead = now + timeout_s, admission.outlook
            request = Request(rows, job, now, until, client, watcher, encoding, upload, prompts, ahead)
            self._places.take(client)
            self._enter(request, scheduler, admission.promise)
            self.arrivals.note(job.work, now)
        self._observer.request_accepted()
        return request, Accepted(request.future, admission.position, request.eta_s, admission.promise - now)

    def accept_probe(self, row: Row) -> Request:
        """Add the engine's own probe, even while requests are refused. Raises Loading before the queue opens.

        Its texts are encoded, even if their contexts are known.
        """
        with self.lock:
            if self.scheduler is None:
                raise (self._closed or loading)()
            job, prompts = probe_of(row, self.scheduler.machine), Prompts({}, row.texts)
            request = Request([row], job, self._clock(), inf, prompts=prompts)
            self._enter(request, self.scheduler, inf)
            return request

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ServiceError as error:
            if isinstance(error, TooLate) and error.even_alone:
                with self.lock:
                    until = self._clock() + min(error.retry_after, _LOOK_FOR)
                    self.slow_until = max(self.slow_until, until)
            self._observer.request_refused(REFUSALS[type(error)])
            raise

    def check_open(self) -> Scheduler:
        """The scheduler, while requests are accepted. Raises Unavailable while they are refused."""
        if self._closed is not None or self.scheduler is None:
            raise (self._closed or loading)()
        return self.scheduler

    def _enter(self, request: Request, scheduler: Scheduler, promise: float) -> None:
        self._by_job[request.job] = request
        scheduler.add(request.job, promise)
        # The heap must not keep the images and the answer of a request that has left. The Future holds the images. It
        # must not hold its request too, because such circles wait long for the garbage collector.
        known = weakref.ref(request)
        heapq.heappush(self._deadlines, (request.deadline, next(self._count), known))

        def leave(future: Future[Finished]) -> None:
            if future.cancelled() and (cancelled := known()) is not None and self.leave(cancelled):
                self._tell_cancelled(cancelled, "disconnect")

        request.future.add_done_callback(leave)
        self.changed.notify_all()

    # On the way

    def begin(self, request: Request, now: float) -> None:
        """Note that the first row of a request starts, unless one has started before."""
        if request.started is None:
            request.started = now
            if request.client is not None:
                self._observer.request_started(now - request.submitted)

    def start(self, request: Request, row: RowState, slot: int, now: float) -> bool:
        """Note the slot of a starting row. False if its request has left."""
        with self.lock:
            if request.job not in self._by_job:
                self.abandoned.append((request.job.group, slot))
                return False
            row.slot = slot
        self.begin(request, now)
        return True

    # Going out

    def leave(self, request: Request) -> bool:
        """Take a request out, wherever its rows are. False if the request has left before."""
        with self.lock:
            if self._by_job.pop(request.job, None) is None:
                return False
            if self.scheduler is not None:
                self.scheduler.remove(request.job)
            for row in request.job.rows:
                if row.slot is not None:
                    self.abandoned.append((request.job.group, row.slot))
                    row.slot = None
            if request.client is not None:
                self._places.give_back(request.client)
            if len(self._deadlines) > 2 * len(self._by_job):  # many entries are of requests that have left
                known = [(entry, entry[2]()) for entry in self._deadlines]
                self._deadlines = [entry for entry, one in known if one is not None and one.job in self._by_job]
                heapq.heapify(self._deadlines)
            self._tell_all()
            return True

    def take_out_late(self, now: float) -> list[Request]:
        """Take out the requests whose deadline has passed. The caller answers them."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]()
            if request is not None and self.leave(request):
                late.append(request)
        return late

    def finish(self, request: Request, body: bytes) -> None:
        """Answer a request whose images are done, and its body."""
        if not self.leave(request):
            return
        now = self._clock()
        started = request.submitted if request.started is None else request.started
        made = max(started, now if request.made is None else request.made)
        stepped = made if request.stepped is None else max(started, request.stepped)
        images = []
        for row in request.job.rows:
            assert row.image is not None
            images.append(row.image)
            row.image = None
        queue_s, denoise_s, decode_s = started - request.submitted, stepped - started, made - stepped
        finished = Finished(images, queue_s, denoise_s, decode_s, request.encode_s, body)
        if not request.future.set_running_or_notify_cancel():
            self._tell_cancelled(request, "disconnect")
            return
        try:
            if request.client is not None:  # before the answer, so that the answer is counted once it arrives
                kept = now <= request.job.promise
                self._observer.request_finished(finished, kept, request.eta_s, now - request.submitted)
        finally:
            request.future.set_result(finished)

    def fail(self, request: Request, error: ServiceError) -> None:
        """Take a request out and answer it with an error."""
        if self.leave(request):
            self._answer(request, error, _REASONS.get(type(error), "failed"))

    def answer_late(self, late: Iterable[Request]) -> None:
        """Answer the requests of `take_out_late`."""
        for request in late:
            message = f"not done within {request.deadline - request.submitted:g} s"
            self._answer(request, DeadlinePassed(message), "timeout")

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        with self.lock:
            left = list(self._by_job.values())
        for request in left:
            self.fail(request, error())

    def _tell_all(self) -> None:
        for listener in self.listeners:
            listener()
        self.changed.notify_all()

    def _answer(self, request: Request, error: ServiceError, reason: str) -> None:
        """Answer a request that has left."""
        cancelled = not request.future.set_running_or_notify_cancel()
        try:
            self._tell_cancelled(request, "disconnect" if cancelled else reason)
        finally:
            if not cancelled:
                request.future.set_exception(error)

    def _tell_cancelled(self, request: Request, reason: str) -> None:
        if request.client is not None:
            self._observer.request_cancelled(reason)
