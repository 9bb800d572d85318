"""What happens to every request: an id, one line in the log, metrics, security headers, limits, keys."""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.fairness import household
from service.errors import Draining, ServiceError, Unauthorized, UnsupportedCoding
from service.http import logs
from service.http.bodies import IN_SCOPE, Body, Room
from service.http.metrics import Metrics
from service.http.paths import loggable
from service.http.problems import answer, problem

log = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
BODY_PATIENCE_S = 60.0  # for all of a body
BODY_WAIT_S = 10.0  # for room
_MAX_SHOWN = 80  # characters of a header in a message
# Nothing here belongs into a frame, and nothing is a page that loads anything, but the playground and /docs.
_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
_POLICY = b"default-src 'none'; frame-ancestors 'none'"
# A browser that shows an image in a tab makes a page around it, and styles that page.
_POLICY_OF_IMAGES = b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
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
                is_image = headers.get("content-type", "").startswith("image/")
                policy = _POLICY_OF_IMAGES if is_image else _POLICIES.get(path, _POLICY)
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
    """Puts a Body into each request's scope. Refuses what is too large or is encoded before it is read.

    Args:
        room: for all bodies.
        max_body: bytes of one.
        has_keys: clients are API keys.
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
        client = _client_of(scope, self._has_keys)
        body = Body(scope, receive, self._room, client, self._max_body, BODY_PATIENCE_S, BODY_WAIT_S)

        try:
            if body.is_too_large:
                await answer(body.too_large())(scope, receive, send)
            elif coding := _coding_of(scope):
                error = UnsupportedCoding(f"a body must have no Content-Encoding, and has {coding}")
                await answer(error)(scope, receive, send)
            else:
                scope[IN_SCOPE] = body
                await self._app(scope, body.receive, send)
        finally:
            body.let_go()


def _client_of(scope: Scope, has_keys: bool) -> str:
    """Who shares queue and memory with others: a key, or an address where there is none."""
    headers = Headers(scope=scope)
    if has_keys and "authorization" in headers:
        return headers["authorization"].partition(" ")[2].strip()  # "bearer KEY" is no other client
    return household(scope["client"][0]) if scope.get("client") else "unknown"


def _coding_of(scope: Scope) -> str:
    """The content codings of a body, without `identity`. Empty where there is none, or no body."""
    headers = Headers(scope=scope)
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return ""
    codings = (coding.strip().lower() for value in headers.getlist("content-encoding") for coding in value.split(","))
    return ", ".join(coding for coding in codings if coding not in ("", "identity"))[:_MAX_SHOWN]


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
