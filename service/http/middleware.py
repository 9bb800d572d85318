"""Middleware for every request: an id, a log line, metrics, security headers and a body limit."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Draining, UnsupportedCoding
from service.http import logs
from service.http.bodies import IN_SCOPE, Body, Room
from service.http.keys import client_of
from service.http.metrics import Metrics
from service.http.paths import loggable, path_of, pattern_of
from service.http.problems import answer, problem
from service.http.security import security_headers

log = logging.getLogger(__name__)

BODY_PATIENCE_S = 60.0  # for the whole body to arrive
BODY_WAIT_S = 10.0  # of waiting for room
_MAX_SHOWN = 80  # characters of a header in a message

CLIENT_LEFT = 499  # nginx's code for a client that closed the connection; only logs and metrics see it


class RequestLog:
    """Gives each request an id, and records its outcome in a log line and in the metrics.

    While the server drains, each answer closes its connection.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str], is_draining: Callable[[], bool]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = endpoints
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        path = path_of(scope)
        request_id = logs.request_id(Headers(scope=scope).get("x-request-id", ""))
        code = 500
        answered = False

        async def send_and_note(message: Message) -> None:
            nonlocal code, answered
            if message["type"] == "http.response.start":
                code, answered = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if self._is_draining():
                    headers["Connection"] = "close"
                headers.raw.extend(security_headers(path, headers.get("content-type", "")))
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:  # the server shuts down and stops waiting for a body
            if answered:
                raise
            error = Draining("the server shut down before the whole request was here")
            await answer(error, path)(scope, receive, send_and_note)
        except Exception as error:
            fields = {"request_id": request_id, "exception": logs.trace_without_messages(error)}
            log.error("a request failed unexpectedly", extra={"fields": fields})  # noqa: TRY400
            if not answered:  # uvicorn closes the connection of an answer that has begun
                await problem(500, "the server failed; its log says more", path)(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - began
            endpoint = next((one for one in (path, pattern_of(scope)) if one in self._endpoints), "other")
            self._metrics.request_done(endpoint, code, seconds)
            logged_path = loggable(scope["path"])
            logs.access.info(
                "%s %s",
                scope["method"],
                logged_path,
                extra={
                    "fields": {
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": logged_path,
                        "status": code,
                        "duration_ms": round(1000 * seconds, 2),
                        "client": (scope.get("client") or ("unknown",))[0],
                    }
                },
            )


class BodyLimit:
    """Puts a Body into each request's scope. Refuses a body that is too large or encoded, without reading the body.

    Args:
        room: for all bodies.
        max_body: the most bytes of one body.
        has_keys: the server has API keys.
    """

    def __init__(self, app: ASGIApp, room: Room, max_body: int, has_keys: bool) -> None:
        self._app = app
        self._room = room
        self._max_body = max_body
        self._has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = client_of(scope, self._has_keys)
        body = Body(scope, receive, self._room, client, self._max_body, BODY_PATIENCE_S, BODY_WAIT_S)

        try:
            if body.is_too_large:
                await answer(body.too_large(), path_of(scope))(scope, receive, send)
            elif coding := _coding_of(scope):
                error = UnsupportedCoding(f"a body must have no Content-Encoding, and has {coding}")
                await answer(error, path_of(scope))(scope, receive, send)
            else:
                scope[IN_SCOPE] = body
                await self._app(scope, body.receive, send)
        finally:
            body.let_go()


def _coding_of(scope: Scope) -> str:
    """The content codings of a body, without `identity`. Empty if there is no body or no coding."""
    headers = Headers(scope=scope)
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return ""
    codings = (coding.strip().lower() for value in headers.getlist("content-encoding") for coding in value.split(","))
    return ", ".join(coding for coding in codings if coding not in ("", "identity"))[:_MAX_SHOWN]
