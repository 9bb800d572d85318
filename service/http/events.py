"""text/event-stream: the events of a job while the job runs. What they say is each API's own.

sse-starlette sends the events and a comment every HEARTBEAT_S, and notices when a client leaves. The engine's threads
never wait for a reader: they put news into a Mailbox. In the mailbox, new progress replaces old progress. Images stay
until they are sent.
"""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from model.rows import Image
from service.engine.requests import Accepted, Finished, Progress
from service.errors import ServiceError
from service.http.responses import EVENTS

HEARTBEAT_S = 10.0
_LINE_END = "\n"

# sse-starlette would end streams at SIGTERM. Here service/__main__.py drains, and a stream lasts until its job is done.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
# At level debug it would log each event, with all prompts.
logging.getLogger("sse_starlette").setLevel(logging.INFO)


class News(NamedTuple):
    """What has happened to a job.

    Attributes:
        progress: the newest.
        previews: the newest of each image, by index: its step, and the image.
        images: encoded, by index.
    """

    progress: Progress | None
    previews: dict[int, tuple[int, Image]]
    images: dict[int, bytes]


class Mailbox:
    """The unsent news of a job. Implements service.engine.requests.Watcher.

    Args:
        preview_every: steps from one preview to the next.
        loop: the event loop that calls `wait`.
    """

    def __init__(self, preview_every: int, loop: asyncio.AbstractEventLoop) -> None:
        self.preview_every = preview_every
        self._loop = loop
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._news = News(None, {}, {})

    def progress(self, progress: Progress) -> None:
        with self._lock:
            self._news = self._news._replace(progress=progress)
        self._tell()

    def preview(self, index: int, step: int, x0: Image) -> None:
        with self._lock:
            self._news.previews[index] = step, x0
        self._tell()

    def image(self, index: int, encoded: bytes) -> None:
        with self._lock:
            self._news.images[index] = encoded
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        """Make `wait` return."""
        self._arrived.set()

    async def wait(self) -> None:
        """Wait for news since the last `take`."""
        await self._arrived.wait()

    def take(self) -> News:
        """Take out all news."""
        self._arrived.clear()
        with self._lock:
            taken, self._news = self._news, News(None, {}, {})
        return taken


Event = ServerSentEvent


class Telling(Protocol):
    """Says what happens to a job, in the events of one API."""

    def queued(self, accepted: Accepted) -> Iterable[Event]:
        """The job is in the queue."""

    def news(self, news: News) -> Iterable[Event | Callable[[], Event]]:
        """Something has happened. A function makes its event, in a thread."""

    def done(self, finished: Finished) -> Iterable[Event]:
        """The job is done, and all of its news are told."""

    def failed(self, error: ServiceError) -> Iterable[Event]:
        """The job has failed."""


class EventStream(EventSourceResponse):
    """Sends the events of a job until the job is done. Cancels the job when the client leaves.

    Args:
        accepted: the job.
        mailbox: the job's watcher.
        telling: makes the events.
        headers: of the answer.
        heartbeat_s: seconds between two comments. The comments keep balancers from closing a quiet connection.
    """

    def __init__(
        self,
        accepted: Accepted,
        mailbox: Mailbox,
        telling: Telling,
        headers: Mapping[str, str],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._accepted = accepted
        self._mailbox = mailbox
        self._telling = telling
        super().__init__(
            self._events(),
            # A proxy that compresses or buffers holds events back.
            headers={**headers, "Cache-Control": "no-store, no-transform"},
            media_type=EVENTS,
            ping=heartbeat_s,
            ping_message_factory=lambda: ServerSentEvent(comment="heartbeat", sep=_LINE_END),
            sep=_LINE_END,
        )
        del self.headers["connection"]  # uvicorn decides whether to keep the connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._accepted.future.cancel()  # no effect on a finished job

    async def _listen_for_exit_signal_with_grace(self) -> None:
        """Replaces sse-starlette's task, which polls for SIGTERM twice a second and outlives the stream."""
        await asyncio.Event().wait()

    async def _events(self) -> AsyncIterator[Event]:
        job = asyncio.wrap_future(self._accepted.future)
        job.add_done_callback(self._ended)
        for event in self._telling.queued(self._accepted):
            yield event
        is_done = False
        while not is_done:
            await self._mailbox.wait()
            is_done = job.done()  # read before the last news is taken
            for told in self._telling.news(self._mailbox.take()):
                yield await run_in_threadpool(told) if callable(told) else told
        try:
            last = self._telling.done(job.result())
        except ServiceError as error:
            last = self._telling.failed(error)
        for event in last:
            yield event

    def _ended(self, job: asyncio.Future[Finished]) -> None:
        if not job.cancelled():
            job.exception()  # asyncio warns about exceptions that nobody reads
        self._mailbox.wake()


def event(data: Mapping[str, object] | str, name: str | None = None) -> Event:
    """An event with this text, or with the JSON of these values."""
    text = data if isinstance(data, str) else json.dumps(data)
    return ServerSentEvent(text, event=name, sep=_LINE_END)
