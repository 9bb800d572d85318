"""Every error that a client can be told of, and the one map from errors to answers.

    ServiceError
    ├── NotHTTP               400
    ├── Unauthorized          401
    ├── NotAcceptable         406
    ├── TooSlow               408
    ├── BodyTooLarge          413
    ├── UnsupportedMedia      415
    │   └── UnsupportedCoding      Accept-Encoding
    ├── Invalid               422
    ├── HeadTooLarge          431
    ├── ComputationFailed     500
    ├── Unavailable           503, Retry-After
    │   ├── Loading
    │   ├── Draining
    │   ├── Failed
    │   ├── QueueFull
    │   ├── TooLate
    │   └── ShareTaken        429
    └── DeadlinePassed        504

Answers are problem documents, RFC 9457. Messages are written for the client, and name nothing of the server.
"""

import http
import math
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from starlette.responses import JSONResponse

_MAX_TEXT = 1000


class FieldError(TypedDict):
    """One invalid field: where it is, and what is wrong with it."""

    loc: list[str | int]
    msg: str


class Document(TypedDict):
    """A problem document. RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: NotRequired[list[FieldError]]


class ServiceError(Exception):
    """The root. The message is one sentence or more for the client."""


class NotHTTP(ServiceError):
    pass


class Unauthorized(ServiceError):
    pass


class NotAcceptable(ServiceError):
    pass


class TooSlow(ServiceError):
    """The whole request was not here in time."""


class BodyTooLarge(ServiceError):
    pass


class UnsupportedMedia(ServiceError):
    pass


class UnsupportedCoding(UnsupportedMedia):
    """The body has a Content-Encoding."""


class Invalid(ServiceError):
    """Input that cannot be served, field by field."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        self.errors = [_shortened(error) for error in errors]
        super().__init__("; ".join(_sentence(error) for error in self.errors))

    @classmethod
    def field(cls, name: str, msg: str) -> "Invalid":
        return cls([{"loc": [name], "msg": msg}])


class HeadTooLarge(ServiceError):
    """The address and the headers."""


class ComputationFailed(ServiceError):
    """This request's own forward passes failed, or its image is not finite."""


class Unavailable(ServiceError):
    """Not now.

    Attributes:
        retry_after: seconds after which it makes sense to ask again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Loading(Unavailable):
    pass


class Draining(Unavailable):
    pass


class Failed(Unavailable):
    pass


class QueueFull(Unavailable):
    """Of requests, or of the room for their bodies."""


class TooLate(Unavailable):
    """Its deadline cannot be met, or not without breaking promises."""


class ShareTaken(Unavailable):
    """The client holds its share of a full queue, or of the room for bodies."""


class DeadlinePassed(ServiceError):
    pass


STATUS: dict[type[ServiceError], int] = {
    NotHTTP: 400,
    Unauthorized: 401,
    NotAcceptable: 406,
    TooSlow: 408,
    BodyTooLarge: 413,
    UnsupportedMedia: 415,
    Invalid: 422,
    HeadTooLarge: 431,
    ComputationFailed: 500,
    ShareTaken: 429,
    Unavailable: 503,
    DeadlinePassed: 504,
}


def answer(error: ServiceError) -> JSONResponse:
    """The problem document of an error."""
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedCoding):
        headers["Accept-Encoding"] = "identity"
    if isinstance(error, NotHTTP | TooSlow | BodyTooLarge | HeadTooLarge):
        headers["Connection"] = "close"  # the rest of the request is not read
    return _respond(document(error), headers)


def document(error: ServiceError) -> Document:
    """What the problem document of an error says."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    said = _document(status, str(error))
    if isinstance(error, Invalid):
        said["errors"] = error.errors
    return said


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The problem document of what is no ServiceError."""
    return _respond(_document(status, detail), headers or {})


def _document(status: int, detail: str) -> Document:
    return {"type": "about:blank", "title": _title(status), "status": status, "detail": printable(detail)}


def _respond(said: Document, headers: Mapping[str, str]) -> JSONResponse:
    headers = {"Cache-Control": "no-store", **headers}
    return JSONResponse(said, said["status"], headers, media_type="application/problem+json")


def _title(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _shortened(error: FieldError) -> FieldError:
    """Without most of what a client sent as a name or a value of many thousands of characters."""
    loc = [_encodable(_short(part)) if isinstance(part, str) else part for part in error["loc"]]
    return {"loc": loc, "msg": _encodable(_short(error["msg"]))}


def _encodable(text: str) -> str:
    """With escapes in the place of halves of characters, which JSON can name and UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """With escapes in the place of what a client sent and no screen should be sent."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def _sentence(error: FieldError) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"]
