"""--local: a client's transport to a server's app in this process, without a port.

This module imports torch and the server. So commands import this module only for --local.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import config
from service.build import START_ERRORS, build
from service.http.app import create_app
from stepwise import StepwiseError
from stepwise.cli.exits import Unusable

Opened = contextlib.AbstractAsyncContextManager[httpx.AsyncBaseTransport]


def assemble(weights: str | None) -> Opened:
    """Load the weights as a server with this environment does, but without API keys.

    Args:
        weights: replaces STEPWISE_WEIGHTS.

    Raises:
        Unusable: the server cannot start.
    """
    logging.basicConfig(format="stepwise: %(message)s", level=logging.ERROR)  # a server warns its operator
    if weights is not None:
        os.environ[f"{config.PREFIX}WEIGHTS"] = weights
    try:
        settings = config.read().model_copy(update={"api_keys": ()})
        engine, served, metrics = build(settings)
    except START_ERRORS as error:
        raise Unusable(str(error)) from None
    app = create_app(engine, served, settings, metrics)

    @asynccontextmanager
    async def opened() -> AsyncIterator[httpx.AsyncBaseTransport]:
        async with contextlib.AsyncExitStack() as stack:
            lifespan = app.router.lifespan_context(app)
            await lifespan.__aenter__()
            # Always end the lifespan, as a server does. A running engine would abort the process at its end.
            stack.push_async_callback(lifespan.__aexit__, None, None, None)
            await asyncio.to_thread(engine.wait_loaded)
            if engine.status != "ready":
                raise StepwiseError(f"{served.model.name} does not work here: a first forward pass failed")
            yield AppTransport(app)

    return opened()


class AppTransport(httpx.AsyncBaseTransport):
    """Calls an ASGI app, and streams the bodies of its answers. httpx's ASGITransport waits for whole bodies.

    A response that is closed before its end looks to the app like a client that has left.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(self._app, request, await request.aread())
        try:
            status, headers = await exchange.start()
        except BaseException:
            await exchange.aclose()
            raise
        return httpx.Response(status, headers=headers, stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One call of the app. Iteration gives the body of the answer."""

    def __init__(self, app: ASGIApp, request: httpx.Request, body: bytes) -> None:
        self._unread = [body]  # until the app takes it
        self._start = asyncio.get_running_loop().create_future()
        self._left = asyncio.Event()
        self._sender, self._receiver = anyio.create_memory_object_stream[bytes](0)  # the app waits for its reader
        self._call = asyncio.ensure_future(_called(app, _scope(request), self._receive, self._send))
        self._call.add_done_callback(lambda _: self._sender.close())

    async def start(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """The status and the headers of the answer."""
        await asyncio.wait({self._start, self._call}, return_when=asyncio.FIRST_COMPLETED)
        if not self._start.done():
            await self._call  # raises the app's error
            raise RuntimeError("the app has ended without an answer")
        message: Message = self._start.result()
        return message["status"], message["headers"]

    async def _receive(self) -> Message:
        if self._unread:
            return {"type": "http.request", "body": self._unread.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start.set_result(message)
            return
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # the reader has left
            if body := message.get("body", b""):
                await self._sender.send(body)
        if not message.get("more_body", False):
            self._sender.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._receiver:
            yield chunk

    async def aclose(self) -> None:
        self._left.set()
        self._receiver.close()
        await self._call


async def _called(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def _scope(request: httpx.Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 0),
    }
