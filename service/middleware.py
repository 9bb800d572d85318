"""What happens to every request: an id, one line in the log, metrics, security headers, limits, keys."""

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.errors import BodyTooLarge, Draining, ServiceError, TooSlow, Unauthorized, answer, problem
from service.metrics import Metrics
from service.paths import loggable

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_LINGER_S = 5.0  # for a client that sends on after a 413
BODY_PATIENCE_S = 60.0  # for all of a body
# Nothing here belongs into a frame, and nothing is a page that loads anything, but the playground and /docs.
_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_POLICY_OF_DOCS = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; frame-ancestors 'none'"
)
_POLICY_OF_PLAYGROUND = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_POLICIES = {"/": _POLICY_OF_PLAYGROUND, "/docs": _POLICY_OF_DOCS}

CLIENT_LEFT = 499  # nginx's code for a client that closed the connection; only logs and metrics see it


def path_of(scope: Scope) -> str:
    """The path of a request, without that which a proxy serves this under."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class RequestLog:
    """Gives each request an id, and says how it went, once, in the log and in the metrics.

    While the server drains, each answer is the last one of its connection.
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
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if _SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
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
                policy = _POLICIES.get(path, _POLICY)
                headers.raw.extend([*_SECURITY, (b"content-security-policy", policy)])
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:  # the server is leaving, and has waited long enough for the rest of a body
            if answered:
                raise
            error = Draining("the server shut down before the whole request was here")
            await answer(error)(scope, receive, send_and_note)
        except Exception as error:
            fields = {"request_id": request_id, "exception": logs.trace_without_messages(error)}
            log.error("a request failed unexpectedly", extra={"fields": fields})  # noqa: TRY400
            if not answered:  # else the answer ends unfinished, and the server closes the connection
                await problem(500, "the server failed; its log says more")(scope, receive, send_and_note)
        finally:
            seconds = time.perf_counter() - began
            self._metrics.request_done(path if path in self._endpoints else "other", code, seconds)
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
    """Answers 413 as soon as a body is known to be too large, before it is read to its end; 408 where it does not come.

    Closing the connection at once would reset it, and a client that is still sending would lose the answer. So what
    it sends on is thrown away, for a short while.
    """

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = BodyTooLarge(f"the body must be at most {self._max_body} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        too_large = declared.isdigit() and int(declared) > self._max_body
        received = 0
        more = True

        deadline = asyncio.get_running_loop().time() + BODY_PATIENCE_S

        async def receive_in_time() -> Message:
            try:
                async with asyncio.timeout_at(deadline if more else None):
                    return await receive()
            except TimeoutError:
                raise TooSlow(f"the whole body was not here within {BODY_PATIENCE_S:g} s") from None

        async def receive_and_count() -> Message:
            nonlocal received, more, too_large
            message = await receive_in_time()
            received += len(message.get("body", b""))
            more = message.get("more_body", False)
            if received > self._max_body:
                too_large = True
                raise error
            return message

        async def send_and_linger(message: Message) -> None:
            if too_large and more and message["type"] == "http.response.body":
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {"type": "http.response.body"}
            await send(message)

        if too_large:
            await answer(error)(scope, receive, send_and_linger)
        else:
            await self._app(scope, receive_and_count, send_and_linger)


async def _discard(receive: Receive) -> None:
    """Read a body to its end, or for as long as is fair."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body", False):
                pass


class ApiKeys:
    """Lets in requests with `Authorization: Bearer KEY`, and all to paths that are open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self._open_paths:
            await self._app(scope, receive, send)
        elif error := self._refusal(Headers(scope=scope).get("authorization")):
            await answer(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, authorization: str | None) -> ServiceError | None:
        if authorization is None:
            return Unauthorized("this server needs an API key: Authorization: Bearer KEY")
        scheme, _, key = authorization.partition(" ")
        sent = key.strip().encode("latin-1")  # the bytes as they came
        known = [hmac.compare_digest(sent, one) for one in self._keys]
        return None if scheme.lower() == "bearer" and any(known) else Unauthorized("the API key is not known")
