"""text/event-stream: how a job goes, while it goes.

The format is that of https://html.spec.whatwg.org/multipage/server-sent-events.html. The engine's thread never waits
for a reader: it leaves what happened in a Mailbox, where newer progress takes the place of older. Images stay until
they are sent.
"""

import asyncio
import base64
import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from model.rows import Image
from service.engine.requests import Accepted, Finished
from service.errors import ServiceError
from service.http.codecs import encode_png
from service.http.leaving import unless_client_leaves
from service.http.metrics import Metrics
from service.http.problems import document
from service.http.responses import EVENTS, timings
from service.plan.plan import Plan
from service.plan.served import Served

HEARTBEAT_S = 10.0


class Mailbox:
    """What happened to a job and is not yet sent. Implements service.engine.requests.Watcher.

    Args:
        preview_every: steps.
        loop: the one whose `wait` is told.
    """

    def __init__(self, preview_every: int, loop: asyncio.AbstractEventLoop) -> None:
        self.preview_every = preview_every
        self._loop = loop
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._progress: tuple[int, int, float] | None = None
        self._previews: dict[int, tuple[int, Image]] = {}  # by index of the image, the newest
        self._images: dict[int, Image] = {}

    def progress(self, step: int, steps: int, eta_s: float) -> None:
        with self._lock:
            self._progress = step, steps, eta_s
        self._tell()

    def preview(self, index: int, step: int, x0: Image) -> None:
        with self._lock:
            self._previews[index] = step, x0
        self._tell()

    def image(self, index: int, image: Image) -> None:
        with self._lock:
            self._images[index] = image
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        """Have `wait` return."""
        self._arrived.set()

    async def wait(self) -> None:
        """Until something was put in since the last `take`."""
        await self._arrived.wait()

    def take(self) -> tuple[tuple[int, int, float] | None, dict[int, tuple[int, Image]], dict[int, Image]]:
        """Take out what is there: progress, previews and images."""
        self._arrived.clear()
        with self._lock:
            taken = self._progress, self._previews, self._images
            self._progress, self._previews, self._images = None, {}, {}
        return taken


class EventStream(Response):
    """Sends a job's events until it is done. A client that leaves cancels it.

    Args:
        accepted: the job.
        mailbox: its watcher.
        plan: what was asked for.
        served: makes rough images of previews that are latents.
        headers: of the response.
        metrics: are told of the time that encoding took.
        heartbeat_s: seconds from one comment to the next, which keep balancers from closing a quiet connection.
    """

    def __init__(
        self,
        accepted: Accepted,
        mailbox: Mailbox,
        plan: Plan,
        served: Served,
        headers: Mapping[str, str],
        metrics: Metrics,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        # Proxies that compress, or collect what they send on, would hold events back.
        not_held = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
        super().__init__(headers={**headers, **not_held}, media_type=EVENTS)
        del self.headers["content-length"]
        self._accepted = accepted
        self._mailbox = mailbox
        self._plan = plan
        self._served = served
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._encode_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, asyncio.ensure_future(self._send_events(send)))
        finally:
            self._accepted.future.cancel()  # no effect on a job that is done

    async def _send_events(self, send: Send) -> None:
        accepted = self._accepted
        job = asyncio.wrap_future(accepted.future)
        job.add_done_callback(self._ended)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        promise = {"eta_s": _rounded(accepted.eta_s), "promise_s": _rounded(accepted.promise_s)}
        await send(_event("queued", {"position": accepted.position, **promise}))
        now = asyncio.get_running_loop().time
        beat = now() + self._heartbeat_s
        while not job.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(beat):
                    await self._mailbox.wait()
            if now() >= beat:
                await send(_body(": heartbeat\n\n"))
                beat = now() + self._heartbeat_s
            await self._send_news(send)
        await self._send_news(send)  # what came last
        try:
            finished = job.result()
        except ServiceError as error:
            await send(_event("error", document(error)))
        else:
            self._metrics.encoded(self._encode_s)
            done = {"parameters": self._plan.parameters, "timings": timings(finished, self._encode_s, self._served)}
            await send(_event("done", done))
        await send({"type": "http.response.body"})

    def _ended(self, job: asyncio.Future[Finished]) -> None:
        if not job.cancelled():
            job.exception()  # seen, also where nobody is left to be told
        self._mailbox.wake()

    async def _send_news(self, send: Send) -> None:
        progress, previews, images = self._mailbox.take()
        if progress is not None:
            step, steps, eta_s = progress
            await send(_event("progress", {"step": step, "steps": steps, "eta_s": _rounded(eta_s)}))
        for index, (step, x0) in previews.items():
            if np.isfinite(x0).all():  # else the job is about to fail
                encoded = await self._encoded(partial(self._preview, x0))
                decoder = {} if self._served.preview is None else {"decoder": "linear"}
                await send(_event("preview", {"index": index, "step": step, **decoder, "b64_json": encoded}))
        for index, image in images.items():
            encoded = await self._encoded(partial(encode_png, image, self._plan.recipes[index]))
            await send(_event("image", {"index": index, "seed": self._plan.seeds[index], "b64_json": encoded}))

    def _preview(self, x0: Image) -> bytes:
        rough = self._served.preview
        return encode_png(x0 if rough is None else rough(x0), {})

    async def _encoded(self, encode: Callable[[], bytes]) -> str:
        began = perf_counter()
        png = await run_in_threadpool(encode)
        self._encode_s += perf_counter() - began
        return base64.b64encode(png).decode()


def _event(name: str, data: Mapping[str, object]) -> Message:
    return _body(f"event: {name}\ndata: {json.dumps(data)}\n\n")


def _body(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
