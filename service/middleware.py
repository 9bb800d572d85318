"""What happens to every request: an id, one line in the log, metrics, limits, keys."""

import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.errors import BodyTooLarge, ServiceError, Unauthorized, answer
from service.metrics import Metrics

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

CLIENT_LEFT = 499  # nginx's code for a client that closed the connection; only logs and metrics see it


class RequestLog:
    """Gives each request an id, and says how it went, once, in the log and in the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if _SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        code = 500

        async def send_and_note(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - began
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.request_done(endpoint, code, seconds)
            logs.access.info(
                "%s %s",
                scope["method"],
                scope["path"],
                extra={
                    "fields": {
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": code,
                        "duration_ms": round(1000 * seconds, 2),
                        "client": (scope.get("client") or ("unknown",))[0],
                    }
                },
            )


class BodyLimit:
    """Answers 413 as soon as a body is known to be too large, before it is read to its end."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = BodyTooLarge(f"the body must be at most {self._max_body} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body:
            await answer(error)(scope, receive, send)
            return
        received = 0

        async def receive_and_count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise error
            return message

        await self._app(scope, receive_and_count, send)


class ApiKeys:
    """Lets in requests with `Authorization: Bearer KEY`. Health checks need no key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/health"):
            await self._app(scope, receive, send)
        elif error := self._refusal(Headers(scope=scope).get("authorization")):
            await answer(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, authorization: str | None) -> ServiceError | None:
        if authorization is None:
            return Unauthorized("this server needs an API key: Authorization: Bearer KEY")
        scheme, _, key = authorization.partition(" ")
        known = [hmac.compare_digest(key.strip().encode(), one) for one in self._keys]
        return None if scheme.lower() == "bearer" and any(known) else Unauthorized("the API key is not known")
