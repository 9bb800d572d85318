"""Finds the beginning and the end of each request: h11, made strict, with a limit for each of its loops.

RFC 9112 lets a proxy and a server read the same bytes differently: one accepts a bare LF as the end of a line, the
other does not. An attacker can hide a request in the difference, and its answer goes to somebody else. So this server
refuses every request that is not plain.
"""

import re
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer

from service.errors import BodyTooLarge, HeadTooLarge, NotHTTP

MAX_HEAD = 2**16  # bytes of a request's first line and headers
MAX_HEADERS = 128
MAX_CHUNK_HEAD = 256  # bytes of a chunk's size and extensions
FREE_CHUNKS = 512  # a body may have these whatever their size; each costs one turn of a Python loop
CHUNK_BYTES = 1024  # the least mean size of a body's further chunks

# Control characters, a lone CR or LF, and a line that continues on the next line.
_BROKEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?![\n]|\Z)|\n[ \t]")
_CHUNK_HEAD = re.compile(rb"[0-9A-Fa-f]{1,8}(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_HOST = re.compile(rb"(?:\[[0-9A-Za-z:.%_-]+\]|[0-9A-Za-z._~%!$&'()*+;=-]*)(?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#]+)(?P<target>[/?][^#]*)?", re.IGNORECASE)


class Framing(h11.Connection):
    """The server's end of a connection. Raises only ServiceErrors. After one, the caller reads no more."""

    _receive_buffer: "_Received"

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self._receive_buffer = _Received()
        self._chunks = self._body = 0  # of the present request: the number of chunks, and the bytes

    @property
    def awaits_head(self) -> bool:
        """Whether the client sends a request next, or is sending its head."""
        return self.their_state is h11.IDLE

    @property
    def awaits_body(self) -> bool:
        """Whether a part of a request's body is still missing."""
        return self.their_state is h11.SEND_BODY

    @property
    def is_over(self) -> bool:
        """Whether the client has announced that it sends no more requests."""
        return self.their_state in (h11.MUST_CLOSE, h11.CLOSED)

    @property
    def has_unread(self) -> bool:
        """Whether bytes wait that belong to no request yet."""
        return bool(self._receive_buffer)

    def next_event(self) -> Any:
        """The next event of h11.

        Raises:
            NotHTTP, HeadTooLarge, BodyTooLarge: h11 refuses the bytes, or this class does.
        """
        if self.awaits_head:
            self._receive_buffer.drop_empty_lines()
        if not self.has_unread and self.their_state in (h11.IDLE, h11.DONE):
            return h11.NEED_DATA  # h11 would say the same, at a tenth of a request's cost
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            reason, _, _ = str(error).partition(": bytearray(")  # the received bytes follow
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
    """Bytes that have arrived and are not parsed yet."""

    def drop_empty_lines(self) -> None:
        """Drop empty lines before a request. Old clients send some after a body. RFC 9112, section 2.2."""
        if self._data.startswith(b"\r\n"):
            blank = len(self._data) - len(self._data.lstrip(b"\r\n"))
            lines = self._data.count(b"\r\n", 0, blank)
            if bytes(self._data[2 * lines : blank]) in (b"", b"\r"):  # other bytes begin no request line
                self._extract(2 * lines)

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a head, or of a body's trailers. None while some are missing."""
        if self._data.startswith(b"\r\n"):  # no trailers
            return super().maybe_extract_lines()
        begin = max(0, self._multiple_lines_search - 1)  # earlier bytes are checked
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
        """Whether the first byte rules out a head. A CR may begin an empty line."""
        return not self._data.startswith(b"\r") and super().is_next_line_obviously_invalid_request_line()

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line with a chunk's size. None while a part of the line is missing."""
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
    """The request, with a path as its target. All programs read such a request alike.

    Raises:
        NotHTTP: programs may read the request differently.
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
    """The request as a client without a proxy sends it. The target's host replaces the header's.

    RFC 9112, section 3.2.2.
    """
    headers = [(b"host", host), *((name, value) for name, value in request.headers if name != b"host")]
    target = target if target.startswith(b"/") else b"/" + target
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)
