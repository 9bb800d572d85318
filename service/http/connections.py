"""A client's connection: uvicorn's h11 protocol, with a time limit wherever uvicorn would wait forever."""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service.errors import ServiceError, TooSlow
from service.http import logs
from service.http.framing import Framing
from service.http.problems import answer
from service.http.security import security_headers

HEAD_PATIENCE_S = 30.0  # for a whole head, and for the beginning of a connection's first request
REST_PATIENCE_S = 60.0  # for the rest of a body after the answer
LINGER_S = 5.0  # for the client to close its side of a connection, once the server has closed its own


class Connection(H11Protocol):
    """A connection that answers an unreadable request with a problem document, and then reads no more.

    Earlier requests of the connection get their answers first.
    """

    conn: Framing
    transport: "_Lingering"  # type: ignore[assignment]  # has all that uvicorn uses of a transport

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = Framing()
        self._inner: Any = self.app
        self.app = self._serve
        self._refused: ServiceError | None = None
        self._patience: asyncio.TimerHandle | None = None  # runs until the client has sent the part in `_awaited`
        self._awaited: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Lingering(transport, self.loop))  # type: ignore[arg-type]
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.transport.end()
        self._be_patient()

    def data_received(self, data: bytes) -> None:
        if self._refused is None and not self.transport.is_closing() and not self.conn.is_over:
            super().data_received(data)

    def handle_events(self) -> None:
        try:
            super().handle_events()
        except ServiceError as error:
            self._refuse(error)
        self._be_patient()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._be_patient()

    def drain(self) -> None:
        """Close after the present answer. Without one, close now if the client has had an answer and asks nothing."""
        if self._is_answering:
            self.cycle.keep_alive = False
        elif self.cycle is not None and not self.conn.has_unread:
            self.transport.close()

    def shutdown(self) -> None:
        """Close after the present answer, or now if there is none. The process is about to end."""
        self.transport.linger_s = 0.0
        if self._is_answering:
            self.cycle.keep_alive = False
        else:
            self.transport.end()

    def _should_upgrade(self) -> bool:
        return False  # a server may ignore an Upgrade header: RFC 9110, section 7.8

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _be_patient(self) -> None:
        """Start the time limit of the part that the client sends next. The same part keeps its timer."""
        awaited = None
        if self.transport.is_closing():
            pass
        elif self.conn.awaits_head and (self.conn.has_unread or self.timeout_keep_alive_task is None):
            self._unset_keepalive_if_required()
            awaited = "head"
        elif self.conn.awaits_body and not self._is_answering:
            awaited = "rest"
        if awaited != self._awaited:
            self._awaited = awaited
            if self._patience is not None:
                self._patience.cancel()
            patience_s = HEAD_PATIENCE_S if awaited == "head" else REST_PATIENCE_S
            self._patience = self.loop.call_later(patience_s, self._too_slow) if awaited else None

    def _too_slow(self) -> None:
        if self.conn.awaits_head and self.conn.has_unread:
            self._refuse(TooSlow(f"the headers were not all here within {HEAD_PATIENCE_S:g} s"))
        else:  # no request has begun, or its answer is complete
            self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer an unreadable request, and close."""
        self._refused = error
        if self._is_answering:  # the request's body is broken, and `_serve` answers
            self.cycle.keep_alive = False
            self.cycle.message_event.set()
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # in other states, the request has its answer
            response, request_id = answer(error), logs.request_id()
            headers = [
                *self.server_state.default_headers,
                *response.raw_headers,
                (b"x-request-id", request_id.encode()),
                *security_headers("", response.media_type or ""),
            ]
            status = HTTPStatus(response.status_code)
            head = b"".join(b"%b: %b\r\n" % header for header in headers)
            line = b"HTTP/1.1 %d %b" % (status, status.phrase.encode())
            self.transport.write(b"%b\r\n%b\r\n%b" % (line, head, bytes(response.body)))
            client = self.client[0] if self.client else "unknown"
            fields = {"request_id": request_id, "status": int(status), "client": client}
            logs.access.info("no request: %s", error, extra={"fields": fields})
        self.transport.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app. `receive` raises the ServiceError of a broken body, unless the answer has begun."""
        cycle = self.cycle

        async def receive_or_refuse() -> Message:
            message = await receive()
            if self._refused is None:
                return message
            if cycle.response_started:
                return {"type": "http.disconnect"}
            raise self._refused

        await self._inner(scope, receive_or_refuse, send)


class _Lingering:
    """A transport that closes its writing side first, and reads on until the client closes, or for LINGER_S.

    Closing both sides while bytes arrive resets the connection. The client may then lose its answer.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None  # set once the writing side is closed
        self.linger_s = LINGER_S

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._timer is not None or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closing():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._timer = self._loop.call_later(self.linger_s, self._transport.close)

    def end(self) -> None:
        """Close both sides at once."""
        if self._timer is not None:
            self._timer.cancel()
        self._transport.close()
