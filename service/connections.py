"""A client's connection: uvicorn's, with an end to heads of requests that are too large or too slow to come."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service import logs
from service.errors import HeadTooLarge, NotHTTP, ServiceError, TooSlow, answer

MAX_HEAD = 2**16  # bytes of a request's first line and headers
HEAD_PATIENCE_S = 30.0  # for all of them, and for the first request of a connection to begin


class Connection(HttpToolsProtocol):
    """Refuses what uvicorn would wait for, or hold, without end. What cannot be read is answered as all errors are."""

    _head: int | None = None  # bytes of a head that is not complete; None where none is on its way
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(HeadTooLarge(f"the address and the headers must be at most {MAX_HEAD} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._head = None
        self._wait_no_more()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(NotHTTP("this is no HTTP request"))

    def _wait_for_head(self) -> None:
        self._wait_no_more()
        self._patience = self.loop.call_later(HEAD_PATIENCE_S, self._too_slow)

    def _wait_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        if self._is_answering:  # the request before this one
            self._wait_for_head()
        elif self._head is None:  # nothing was asked
            self.transport.close()
        else:
            self._refuse(TooSlow(f"the headers were not all here within {HEAD_PATIENCE_S:g} s"))

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _refuse(self, error: ServiceError) -> None:
        """Answer, unless that would go into the midst of another answer, and close."""
        self._head = None
        self._wait_no_more()
        if not self._is_answering and not self.transport.is_closing():
            response = answer(error)
            headers = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
            self.transport.write(b"HTTP/1.1 %d \r\n%b\r\n%b" % (response.status_code, headers, bytes(response.body)))
            client = self.client[0] if self.client else "unknown"
            fields = {"status": response.status_code, "client": client}
            logs.access.info("no request: %s", error, extra={"fields": fields})
        self.transport.close()
