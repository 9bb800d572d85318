"""A stage beside denoising: a thread, and the pieces of work that wait for the thread, the earliest promise first."""

import heapq
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from model.rows import Group, Image, Text
from service.engine.costs import Machine
from service.engine.requests import Request
from service.engine.scheduler import Scheduler
from service.engine.turns import must_wait
from service.engine.waves import RowState
from service.engine.worker import Worker, Workplace
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

Name = Literal["encode", "decode", "check", "answer"]


class Observer(Protocol):
    """Hears of a stage's batches."""

    def batch_done(self, stage: Name, pieces: int, seconds: float) -> None: ...
    def batch_failed(self, stage: Name) -> None: ...


@dataclass(frozen=True, order=True, slots=True)
class Piece:
    """A piece of work. Pieces sort in the order of work.

    Attributes:
        index: of the image, the text or the upload in its request; the number of images for work on the whole request.
        row: of the image; None for a text or an upload, and for work on the whole request.
        given, text: what the work is done on.
    """

    promise: float
    number: float
    index: int
    request: Request = field(compare=False)
    row: RowState | None = field(compare=False)
    given: Image | None = field(compare=False)
    text: Text | None = field(default=None, compare=False)

    @classmethod
    def of_text(cls, request: Request, index: int, text: Text) -> "Piece":
        return cls(request.job.promise, request.job.number, index, request, None, None, text)

    @classmethod
    def of_upload(cls, request: Request, index: int, image: Image) -> "Piece":
        return cls(request.job.promise, request.job.number, index, request, None, image)

    @classmethod
    def of_row(cls, request: Request, row: RowState, given: Image) -> "Piece":
        return cls(request.job.promise, request.job.number, row.index, request, row, given)

    @classmethod
    def of_whole(cls, request: Request) -> "Piece":
        return cls(request.job.promise, request.job.number, len(request.rows), request, None, None)


class Cost(Protocol):
    """The seconds of a call, by the amount of its work: a number of images, or of values."""

    def seconds(self, amount: int) -> float: ...
    def at_most(self, amount: int) -> float: ...
    def follow(self, amount: int, seconds: float) -> None: ...


class Task(Protocol):
    """What a stage does.

    Attributes:
        name: of the stage.
        doing: the work, in logs: "decoding".
    """

    name: Name
    doing: str

    def cost(self, machine: Machine, batch: Sequence[Piece]) -> Cost: ...

    def most(self, machine: Machine, group: Group) -> int:
        """The most pieces of a batch."""

    def amount(self, batch: Sequence[Piece]) -> int:
        """How much work a batch is, for its cost."""

    def known(self, piece: Piece) -> Any | None:
        """The result of a piece that needs no work; None if it needs some."""

    def run(self, batch: Sequence[Piece]) -> Sequence[Any]:
        """Do the work of pieces of one group. Returns each piece's result."""

    def tests_model(self, batch: Sequence[Piece], worked: bool) -> bool:
        """Whether a call of `run` shows that the model works, or puts the model in doubt.

        A client's upload may be the cause of an error instead.
        """

    def failed(self, piece: Piece) -> str:
        """The message for a client whose piece fails."""

    def done(self, piece: Piece, result: Any) -> Iterable[Piece]:
        """Hand the result of a piece on. The request may have left. Returns further work for this stage."""


class Stage(Worker):
    """The thread, and the pieces that wait.

    Args:
        task: what the thread does. Once the engine is warm, only this thread calls `run`.
        at: what the engine's threads share.
    """

    def __init__(self, task: Task, at: Workplace[Observer]) -> None:
        super().__init__(task.doing, task.doing, at)
        self._task = task
        self._observer = at.observer
        self._wake = threading.Condition(at.queue.lock)
        self._lines: dict[Group, list[Piece]] = {}  # heaps
        self._held: list[Piece] = []  # pieces that wait for jobs ahead
        at.queue.listeners.append(self._listen)

    def put(self, pieces: Iterable[Piece]) -> None:
        """Add pieces. One call adds all of them, so that they share batches."""
        added = list(pieces)
        if not added:
            return
        with self._queue.lock:
            self._add(added)
            self._wake.notify_all()

    def _add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            heapq.heappush(self._lines.setdefault(piece.request.job.group, []), piece)

    def _listen(self) -> None:
        """A request has left the queue, and pieces may have waited for it. Or the thread must end."""
        if self._held or self._queue.stopping:
            self._wake.notify_all()

    def _work(self) -> bool:
        with self._queue.lock:
            while not (self._has_work() or self._queue.stopping):
                self.stage_health.rest()
                self._wake.wait()
            if self._queue.stopping:
                return False
            self.stage_health.beat(0.0)
            now = self._clock()
            late = self._queue.take_out_late(now)
            batch = self._next_batch()
        self._queue.answer_late(late)
        for piece in batch:
            if not piece.request.job.encoding:  # else it still waits for its first step
                self._queue.begin(piece.request, now)
        if batch:
            self._run(batch)
        return True

    def _next_batch(self) -> list[Piece]:
        """Take out the next pieces, all of one group. None goes after a piece of another group that waits."""
        if not self._has_work():
            return []
        group, *others = sorted(self._lines, key=lambda group: self._lines[group][0])
        line, most = self._lines[group], self._task.most(self._machine, group)
        until = self._lines[others[0]][0] if others else None
        batch: list[Piece] = []
        while line and len(batch) < most and (until is None or line[0] < until):
            batch.append(heapq.heappop(line))
            self._sort_out(group)
        return batch

    def _has_work(self) -> bool:
        """Whether a piece can be worked on now. Pieces of requests that have left are dropped."""
        held, self._held = self._held, []
        self._add(held)
        for group in [*self._lines]:
            self._sort_out(group)  # else the promise of a piece that cannot be worked on could choose the group
        return bool(self._lines)

    def _sort_out(self, group: Group) -> None:
        """Take out the first pieces of a group as long as their requests have left, or as they must wait for others."""
        line = self._lines[group]
        while line:
            job = line[0].request.job
            if self._queue.of(job) is not None:
                if not must_wait(self._scheduler.by_promise, self._task.name, job):
                    return
                self._held.append(line[0])
            heapq.heappop(line)
        del self._lines[group]

    @property
    def _scheduler(self) -> Scheduler:
        assert self._queue.scheduler is not None
        return self._queue.scheduler

    @property
    def _machine(self) -> Machine:
        return self._scheduler.machine

    def _run(self, batch: Sequence[Piece]) -> None:
        """Run a batch. If the batch raises, try each piece alone."""
        if len(batch) == 1 and (result := self._task.known(batch[0])) is not None:
            self.put(self._task.done(batch[0], result))
            return
        try:
            results = self._call(batch)
        except Exception:
            log.exception("%s of %d pieces failed; each is tried alone", self._task.doing, len(batch))
            for piece in batch:
                self._run_alone(piece)
            return
        for piece, result in zip(batch, results, strict=True):
            self.put(self._task.done(piece, result))

    def _run_alone(self, piece: Piece) -> None:
        if self._queue.of(piece.request.job) is None:
            return
        try:
            [result] = self._call([piece])
        except Exception:
            log.exception("and alone")
            self._queue.fail(piece.request, ComputationFailed(self._task.failed(piece)))
        else:
            self.put(self._task.done(piece, result))

    def _call(self, batch: Sequence[Piece]) -> Sequence[Any]:
        scheduler = self._scheduler
        group, task, began = batch[0].request.job.group, self._task, self._clock()
        cost, amount = task.cost(scheduler.machine, batch), task.amount(batch)
        with self._queue.lock:
            scheduler.began(task.name, cost.at_most(amount), {piece.request.job for piece in batch})
            self.stage_health.beat(cost.seconds(amount))
        worked = False
        try:
            results = task.run(batch)
            worked = True
        finally:
            seconds = self._clock() - began
            with self._queue.lock:  # so that a health check sees all of these changes or none
                scheduler.ended(task.name)
                if worked:
                    cost.follow(amount, seconds)
                self.stage_health.beat(0.0)
                if task.tests_model(batch, worked):
                    self.stage_health.call_ended(group, worked)
            if not worked:
                self._observer.batch_failed(task.name)
        self._observer.batch_done(task.name, len(batch), seconds)
        return results
