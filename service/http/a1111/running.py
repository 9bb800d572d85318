"""The requests of AUTOMATIC1111's programs that run now: how far each is, and its interruption.

A caller sees and interrupts its own requests alone. All calls come from the event loop's thread, but for those of the
engine's threads to a Job, which is their Watcher.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from model.rows import Image
from service.engine.requests import Accepted, Finished, Progress
from service.http.a1111.info import timestamp

PREVIEW_EVERY = 10  # steps


class Job:
    """A request on its way. Implements service.engine.requests.Watcher.

    Args:
        task_id: by which its caller names it.
        call: what its caller called.
        images: how many it asks for.
        steps: of each image.

    Attributes:
        name: for its caller.
        began: a timestamp.
        is_interrupted: whether its caller has interrupted it.
    """

    def __init__(self, task_id: str | None, call: str, images: int, steps: int) -> None:
        self.task_id = task_id
        self.name = task_id or call
        self.began = timestamp()
        self._stop = asyncio.Event()
        self._lock = threading.Lock()
        self._planned = Progress(0, steps, 0.0, 0, images, 0.0)
        self._accepted: Accepted | None = None
        self._progress: Progress | None = None
        self._preview: Image | None = None
        self._images: dict[int, bytes] = {}

    # For the engine's threads.

    @property
    def preview_every(self) -> int:
        return PREVIEW_EVERY

    def progress(self, progress: Progress) -> None:
        with self._lock:
            self._progress = progress

    def preview(self, index: int, step: int, x0: Image) -> None:
        with self._lock:
            self._preview = x0

    def image(self, index: int, encoded: bytes) -> None:
        with self._lock:
            self._images[index] = encoded

    # For the event loop.

    @property
    def latest(self) -> Progress:
        """The newest progress."""
        with self._lock:
            if self._progress is not None:
                return self._progress
        return self._planned if self._accepted is None else self._planned._replace(eta_s=self._accepted.eta_s)

    @property
    def latest_preview(self) -> Image | None:
        """The newest preview of any of its images; None before the first."""
        with self._lock:
            return self._preview

    @property
    def images(self) -> dict[int, bytes]:
        """The images that are done, encoded, by index."""
        with self._lock:
            return dict(self._images)

    @property
    def is_interrupted(self) -> bool:
        return self._stop.is_set()

    def interrupt(self) -> None:
        """Make `result` return, now or later."""
        self._stop.set()

    async def result(self, accepted: Accepted) -> Finished | None:
        """Wait for the end. None if the request was interrupted first: then it leaves the engine.

        Raises:
            ServiceError: the request failed.
        """
        self._accepted = accepted
        done = asyncio.wrap_future(accepted.future)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((done, stop), return_when=asyncio.FIRST_COMPLETED)
            return done.result() if done.done() else None
        finally:
            stop.cancel()
            done.cancel()  # no effect on a finished request


class Running:
    """The requests that run, by caller, in the order in which they came."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[Job]] = {}

    @contextmanager
    def of(self, client: str, job: Job) -> Iterator[None]:
        """Count a job of a caller as running."""
        self._jobs.setdefault(client, []).append(job)
        try:
            yield
        finally:
            self._jobs[client].remove(job)
            if not self._jobs[client]:
                del self._jobs[client]

    def oldest(self, client: str, task_id: str | None = None) -> Job | None:
        """The oldest request of a caller, or the oldest with this id; None if none runs."""
        own = self._jobs.get(client, [])
        return next((job for job in own if task_id in (None, job.task_id)), None)
