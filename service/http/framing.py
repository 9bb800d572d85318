"""Where a request begins and ends: h11, with what it is lenient about refused, and a limit to all that it loops over.

RFC 9112 lets two programs on one path read the same bytes differently: one takes a bare LF for the end of a line, the
other does not. A request that hides in the difference is answered as somebody else's. So what is not plain is refused.
"""

import re
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer

from service.errors import BodyTooLarge, HeadTooLarge, NotHTTP

MAX_HEAD = 2**16  # bytes of a request's first line and headers
MAX_HEADERS = 128
MAX_CHUNK_HEAD = 256  # bytes of a chunk's size and extensions
FREE_CHUNKS = 512  # of a body, however small. Each takes a pass through a loop in Python.
CHUNK_BYTES = 1024  # the least mean of more

# Control characters, a CR or LF alone, and a line that goes on with the next.
_BROKEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?![\n]|\Z)|\n[ \t]")
_CHUNK_HEAD = re.compile(rb"[0-9A-Fa-f]{1,8}(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_-]+\]|[0-9A-Za-z._~%!$&'()*+;=-]*)(?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#]+)(?P<target>[/?][^#]*)?", re.IGNORECASE)


class Framing(h11.Connection):
    """The server's end of a connection. Raises ServiceErrors alone; nothing that comes after one may be read."""

    _receive_buffer: "_Received"

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self._receive_buffer = _Received()
        self._chunks = self._body = 0  # of the request that is read: how many, and bytes

    @property
    def awaits_head(self) -> bool:
        """Whether a request is to come next, or is on its way."""
        return self.their_state is h11.IDLE

    @property
    def awaits_body(self) -> bool:
        """Whether some of a request's body is still to come."""
        return self.their_state is h11.SEND_BODY

    @property
    def is_over(self) -> bool:
        """Whether the client has said that no request comes any more."""
        return self.their_state in (h11.MUST_CLOSE, h11.CLOSED)

    @property
    def has_unread(self) -> bool:
        """Whether something came that is part of no request yet."""
        return bool(self._receive_buffer)

    def next_event(self) -> Any:
        """h11's.

        Raises:
            NotHTTP, HeadTooLarge, BodyTooLarge: for what h11 refuses, and for more.
        """
        if self.awaits_head:
            self._receive_buffer.drop_empty_lines()
        if not self.has_unread and self.their_state in (h11.IDLE, h11.DONE):
            return h11.NEED_DATA  # h11 would find that out too, at a tenth of a request's cost
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            reason, _, _ = str(error).partition(": bytearray(")  # and what came
            raise NotHTTP(f"this is no HTTP request: {reason}") from None
        if isinstance(event, h11.Request):
            self._chunks = self._body = 0
            return _plain(event)
        if isinstance(event, h11.Data):
            self._body += len(event.data)
            self._chunks += event.chunk_start
            if self._chunks > FREE_CHUNKS + self._body // CHUNK_BYTES:
                raise BodyTooLarge(
                    f"the body has more than {FREE_CHUNKS} chunks, of less than {CHUNK_BYTES} bytes each"
                )
        return event


class _Received(ReceiveBuffer):
    """What came and is not read yet."""

    def drop_empty_lines(self) -> None:
        """Old clients send some after a body. RFC 9112, section 2.2."""
        if self._data.startswith(b"\r\n"):
            blank = len(self._data) - len(self._data.lstrip(b"\r\n"))
            lines = self._data.count(b"\r\n", 0, blank)
            if bytes(self._data[2 * lines : blank]) in (b"", b"\r"):  # else it is no line that comes next
                self._extract(2 * lines)

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a head, or of the trailers of a body; None where they are not all here."""
        if self._data.startswith(b"\r\n"):  # no trailers
            return super().maybe_extract_lines()
        begin = max(0, self._multiple_lines_search - 1)  # what is before was looked at
        last = self._data.find(b"\r\n\r\n", begin, MAX_HEAD)
        end = len(self._data) if last < 0 else last + 4
        if end > MAX_HEAD:
            raise HeadTooLarge(f"the address and the headers must be at most {MAX_HEAD} bytes")
        if _BROKEN.search(self._data, begin, end):
            raise NotHTTP("this is no HTTP request: control characters, or lines that do not end with CR LF")
        if self._data.count(b"\n", 0, end) > MAX_HEADERS + 2:
            raise HeadTooLarge(f"there must be at most {MAX_HEADERS} headers")
        return super().maybe_extract_lines()

    def is_next_line_obviously_invalid_request_line(self) -> bool:
        """Whether the first byte shows that no head comes. A CR may begin an empty line."""
        return not self._data.startswith(b"\r") and super().is_next_line_obviously_invalid_request_line()

    def maybe_extract_next_line(self) -> bytearray | None:
        """The size of a chunk; None where it is not all here."""
        line = super().maybe_extract_next_line()
        if line is None:
            if len(self._data) > MAX_CHUNK_HEAD or b"\n" in self._data:
                raise NotHTTP(_BAD_CHUNK)
        elif len(line) > MAX_CHUNK_HEAD or not _CHUNK_HEAD.fullmatch(line):
            raise NotHTTP(_BAD_CHUNK)
        return line


_BAD_CHUNK = (
    f"this is no HTTP request: a chunk begins with its size in 1 to 8 hex digits, in at most {MAX_CHUNK_HEAD} bytes"
)


def _plain(request: h11.Request) -> h11.Request:
    """A request that no two programs read differently, and its path alone as its target.

    Raises:
        NotHTTP: for any other.
    """
    headers = dict(request.headers)
    if request.http_version not in (b"1.0", b"1.1"):
        raise NotHTTP("this is no HTTP request: its version must be 1.0 or 1.1")
    if b"transfer-encoding" in headers and (b"content-length" in headers or request.http_version == b"1.0"):
        raise NotHTTP("this is no HTTP request: a chunked body has no Content-Length, and is new in HTTP/1.1")
    if request.method == b"CONNECT":
        raise NotHTTP("this server is no proxy: it takes no CONNECT")
    if absolute := _ABSOLUTE.fullmatch(request.target):
        request = _relative(request, absolute["host"], absolute["target"] or b"/")
        headers[b"host"] = absolute["host"]
    elif request.target != b"*" and (not request.target.startswith(b"/") or b"#" in request.target):
        raise NotHTTP("this is no HTTP request: its target must be a path")
    if not _HOST.fullmatch(headers.get(b"host", b"")):
        raise NotHTTP("this is no HTTP request: its Host is no name or address")
    return request


def _relative(request: h11.Request, host: bytes, target: bytes) -> h11.Request:
    """As it would be without a proxy. RFC 9112, section 3.2.2: the target's host goes before the header's."""
    headers = [(b"host", host), *((name, value) for name, value in request.headers if name != b"host")]
    target = target if target.startswith(b"/") else b"/" + target
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)
