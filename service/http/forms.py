"""Parses multipart/form-data in bounded time. RFC 7578."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import Invalid, UnsupportedMedia
from service.http.models import MAX_FIELDS
from service.http.pieces import PIECE, Bytes, pieces

_MAX_FIELD = 2**16  # bytes
_MAX_PARAMETERS = 32  # of a Content-Disposition
_MAX_TYPE = 1000  # characters of a Content-Type
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")  # some other codecs of Python raise, or take very long


@dataclass
class Part:
    """One part of a form.

    Attributes:
        filename: None for a part that is no file.
    """

    name: str = ""
    filename: str | None = None
    data: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """The content of a field. Raises Invalid if the content is not UTF-8."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise Invalid.field(self.name, "must be text in UTF-8") from None


def read_form(
    content_type: str, body: Bytes, files: Collection[str] = ("image",), most: int | None = None
) -> list[Part]:
    """The parts of a form, with at most MAX_FIELDS fields.

    Args:
        files: the names of files. Fields with these names may be as long as files.
        most: files; None for as many as they have names.

    Raises:
        UnsupportedMedia: the form is not in UTF-8.
        Invalid: the form is broken, or has too many parts.
    """
    if len(content_type) > _MAX_TYPE:
        raise _unreadable(f"its Content-Type has more than {_MAX_TYPE} characters")
    _, options = parse_options_header(content_type)
    charset = options.get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        raise UnsupportedMedia(f"a form must be in UTF-8, and its charset is {charset.decode('latin-1')!r}")
    boundary = options.get(b"boundary")
    if not boundary:
        raise _unreadable("its Content-Type has no boundary")
    _check_boundaries(body, boundary)
    collected = _Parts(files, len(files) if most is None else most)
    try:
        parser = MultipartParser(boundary, collected.callbacks)  # type: ignore[arg-type]
        for begin in pieces(len(body)):
            parser.write(bytes(body[begin : begin + PIECE]))
    except FormParserError as error:
        raise _unreadable(str(error)) from None
    if not collected.ended:  # the parser accepts a form that is cut short
        raise _unreadable(f"it lacks its end, {(b'--' + boundary + b'--').decode('latin-1')}")
    return collected.parts


def _unreadable(why: str) -> Invalid:
    return Invalid.field("body", f"is not a readable form: {why}")


def _check_boundaries(body: Bytes, boundary: bytes) -> None:
    """Bound the work of the parser, which handles the bytes after each boundary in a Python loop.

    RFC 2046 allows no boundary within a part.

    Raises:
        Invalid: the form has too many boundaries, or other bytes than a new line or two hyphens follow a boundary.
    """
    delimiter = b"--" + boundary
    for count, end in enumerate(_ends(body, b"\r\n" + delimiter)):
        if count > 2 * MAX_FIELDS:
            raise _unreadable("Too many fields or files")
        if body[end : end + 2] not in (b"\r\n", b"--"):
            raise _unreadable(f"a line begins with its boundary and goes on, at byte {end}")
    if body.startswith(delimiter) and body[len(delimiter) : len(delimiter) + 2] not in (b"\r\n", b"--"):
        raise _unreadable("its first line is not its boundary")


def _ends(body: Bytes, delimiter: bytes) -> Iterator[int]:
    """The end of each delimiter. The search goes piece by piece."""
    for piece in pieces(len(body)):
        begin = piece
        end = piece + PIECE + len(delimiter) - 1  # a delimiter belongs to the piece of its first byte
        while (found := body.find(delimiter, begin, end)) >= 0:
            begin = found + len(delimiter)
            yield begin


class _Parts:
    """Collects the parts of a form from the parser's callbacks."""

    def __init__(self, files: Collection[str], most: int) -> None:
        self._files = files
        self._most = most
        self.parts: list[Part] = []
        self.ended = False
        self._header = bytearray()
        self._value = bytearray()
        self._disposition: bytes | None = None
        self.callbacks = {
            "on_part_begin": self._begin,
            "on_part_data": self._add,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = None

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        if self._disposition is not None and self._disposition.count(b";") > _MAX_PARAMETERS:
            raise _unreadable(f"a Content-Disposition has more than {_MAX_PARAMETERS} parameters")
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _unreadable("a part has no name in its Content-Disposition")
        filename = options.get(b"filename")
        name = options[b"name"].decode(errors="replace")
        self.parts.append(Part(name, None if filename is None else filename.decode(errors="replace")))
        files = sum(part.filename is not None for part in self.parts)
        if files > self._most:
            raise _unreadable(f"Too many files: it may have {self._most}")
        if len(self.parts) - files > MAX_FIELDS:
            raise _unreadable(f"Too many fields: it may have {MAX_FIELDS}")

    def _add(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.data += data[start:end]
        if part.filename is None and part.name not in self._files and len(part.data) > _MAX_FIELD:
            raise _unreadable(f"the field {part.name[:80]!r} has more than {_MAX_FIELD} bytes")

    def _end(self) -> None:
        self.ended = True
