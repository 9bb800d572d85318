"""Errands: encode and decode calls that routes make directly. Errands are not scheduled, and have no promise."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from model.rows import Image
from service.engine.queue import Queue
from service.errors import QueueFull, ServiceError, Unavailable


class Errand(NamedTuple):
    """A call of the VAE, and the Future of its result."""

    run: Callable[[], Image]
    future: Future[Image]


class Errands:
    """The waiting errands, in order of arrival.

    Args:
        queue: errands are accepted while the queue accepts requests. Its lock guards all of this.
        most: the most errands that may wait.

    Attributes:
        seconds: of one errand, roughly; 0 until measured.
    """

    def __init__(self, queue: Queue, most: int) -> None:
        self._queue = queue
        self._changed = queue.changed
        self._most = most
        self._waiting: deque[Errand] = deque()  # the first may be under way
        self.seconds = 0.0

    def add(self, run: Callable[[], Image]) -> Future[Image]:
        """Add an errand. A cancelled Future takes the errand out.

        Raises:
            Unavailable: the queue is closed, or too many errands wait.
        """
        with self._changed:
            self._queue.check_open()
            self._forget_cancelled()
            if len(self._waiting) >= self._most:
                message = f"{len(self._waiting)} uploads wait to be encoded or decoded"
                raise QueueFull(message, len(self._waiting) * self.seconds)
            errand = Errand(run, Future())
            self._waiting.append(errand)
            self._changed.notify_all()
            return errand.future

    def first(self) -> Errand | None:
        """The next errand. The errand stays here until `answer`."""
        self._forget_cancelled()
        return self._waiting[0] if self._waiting else None

    def answer(self, errand: Errand, outcome: Image | ServiceError) -> None:
        """Answer the first errand, unless it is answered or cancelled already."""
        with self._changed:
            is_here = bool(self._waiting) and self._waiting[0] is errand
            if is_here:
                self._waiting.popleft()
                self._changed.notify_all()
        if is_here:
            _answer(errand.future, outcome)

    def fail_all(self, why: Callable[[], Unavailable]) -> None:
        """Answer all errands with an error, also a running one."""
        with self._changed:
            errands, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for errand in errands:
            _answer(errand.future, why())

    def __len__(self) -> int:
        """How many errands are not cancelled."""
        return sum(not errand.future.cancelled() for errand in self._waiting)

    def _forget_cancelled(self) -> None:
        self._waiting = deque(errand for errand in self._waiting if not errand.future.cancelled())


def _answer(future: Future[Image], outcome: Image | ServiceError) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
