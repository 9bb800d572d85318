"""text/event-stream: the events of a job while the job runs.

sse-starlette sends the events and a comment every HEARTBEAT_S, and notices when a client leaves. The engine's threads
never wait for a reader: they put news into a Mailbox. In the mailbox, new progress replaces old progress. Images stay
until they are sent.
"""

import asyncio
import base64
import contextlib
import json
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from model.rows import Image
from service.engine.requests import Accepted, Finished, Progress
from service.errors import ServiceError
from service.http.png import encode_png
from service.http.problems import document
from service.http.responses import EVENTS, timings
from service.plan.plan import Plan
from service.plan.served import Served

HEARTBEAT_S = 10.0
_LINE_END = "\n"
_PARTS = 10_000  # of all work, in which progress is told

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


class EventStream(EventSourceResponse):
    """Sends the events of a job until the job is done. Cancels the job when the client leaves.

    Args:
        accepted: the job.
        mailbox: the job's watcher.
        plan: of the request.
        served: turns latent previews into rough images.
        headers: of the answer.
        heartbeat_s: seconds between two comments. The comments keep balancers from closing a quiet connection.
    """

    def __init__(
        self,
        accepted: Accepted,
        mailbox: Mailbox,
        plan: Plan,
        served: Served,
        headers: Mapping[str, str],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._accepted = accepted
        self._mailbox = mailbox
        self._plan = plan
        self._served = served
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

    async def _events(self) -> AsyncIterator[ServerSentEvent]:
        accepted = self._accepted
        job = asyncio.wrap_future(accepted.future)
        job.add_done_callback(self._ended)
        times = {"eta_s": _rounded(accepted.eta_s), "promise_s": _rounded(accepted.promise_s)}
        yield _event("queued", {"position": accepted.position, **times, "warnings": self._plan.warnings})
        is_done = False
        while not is_done:
            await self._mailbox.wait()
            is_done = job.done()  # read before the last news is taken
            for name, data, image in self._news():
                png = await run_in_threadpool(image) if callable(image) else image
                encoded = {} if png is None else {"b64_json": base64.b64encode(png).decode()}
                yield _event(name, {**data, **encoded})
        try:
            finished = job.result()
        except ServiceError as error:
            yield _event("error", document(error))
        else:
            yield _event("done", {"parameters": self._plan.parameters, "timings": timings(finished, self._served)})

    def _ended(self, job: asyncio.Future[Finished]) -> None:
        if not job.cancelled():
            job.exception()  # asyncio warns about exceptions that nobody reads
        self._mailbox.wake()

    def _news(self) -> Iterator[tuple[str, dict[str, object], bytes | Callable[[], bytes] | None]]:
        """The name and the data of each event, and its image: encoded, or a function that encodes it."""
        news = self._mailbox.take()
        if news.progress is not None:
            yield "progress", _shown(news.progress), None
        for index, (step, x0) in news.previews.items():
            if np.isfinite(x0).all():  # a job with other values is about to fail
                decoder = {} if self._served.preview is None else {"decoder": "linear"}
                yield "preview", {"index": index, "step": step, **decoder}, partial(self._preview, x0)
        for index, image in news.images.items():
            yield "image", {"index": index, "seed": self._plan.seeds[index]}, image

    def _preview(self, x0: Image) -> bytes:
        rough = self._served.preview
        return encode_png(x0 if rough is None else rough(x0), {})


def _shown(progress: Progress) -> dict[str, object]:
    """Progress as its event has it."""
    fraction = math.floor(progress.fraction * _PARTS) / _PARTS  # never rounded up to 1
    return {**progress._asdict(), "eta_s": _rounded(progress.eta_s), "fraction": fraction}


def _event(name: str, data: Mapping[str, object]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(data), event=name, sep=_LINE_END)


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
