"""The one map from errors to answers, which are problem documents. RFC 9457.

NotHTTP               400
TooManyImages         400
Unauthorized          401, WWW-Authenticate
UnknownModel          404
UnknownSampler        404
NotAcceptable         406
TooSlow               408
BodyTooLarge          413
UnsupportedMedia      415
UnsupportedCoding     415, Accept-Encoding
Invalid               422
Refused               422
HeadTooLarge          431
ComputationFailed     500
NotBuilt              501
Unavailable           503, Retry-After
ShareTaken            429, Retry-After
DeadlinePassed        504
"""

import http
import math
from collections.abc import Mapping
from typing import NotRequired, TypedDict

from starlette.responses import JSONResponse

from service.errors import (
    BodyTooLarge,
    ComputationFailed,
    DeadlinePassed,
    FieldError,
    HeadTooLarge,
    Invalid,
    NotAcceptable,
    NotBuilt,
    NotHTTP,
    Refused,
    ServiceError,
    ShareTaken,
    TooManyImages,
    TooSlow,
    Unauthorized,
    Unavailable,
    UnknownModel,
    UnknownSampler,
    UnsupportedCoding,
    UnsupportedMedia,
)
from service.http.a1111 import errors as a1111
from service.http.openai import errors as openai


class Document(TypedDict):
    """A problem document. RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: NotRequired[list[FieldError]]


STATUS: dict[type[ServiceError], int] = {
    NotHTTP: 400,
    TooManyImages: 400,
    Unauthorized: 401,
    UnknownModel: 404,
    UnknownSampler: 404,
    NotAcceptable: 406,
    TooSlow: 408,
    BodyTooLarge: 413,
    UnsupportedMedia: 415,
    Invalid: 422,
    Refused: 422,
    HeadTooLarge: 431,
    ComputationFailed: 500,
    NotBuilt: 501,
    ShareTaken: 429,
    Unavailable: 503,
    DeadlinePassed: 504,
}


def answer(error: ServiceError, path: str = "") -> JSONResponse:
    """The answer to a request that ends in an error.

    Args:
        path: of the request, as service.http.paths.path_of has it. It decides the shape of the answer.
    """
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnsupportedCoding):
        headers["Accept-Encoding"] = "identity"
    if isinstance(error, NotHTTP | TooSlow | BodyTooLarge | HeadTooLarge):
        headers["Connection"] = "close"  # the rest of the request is not read
    return _respond(document(error), headers, path, error)


def document(error: ServiceError) -> Document:
    """The content of an error's problem document."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    said = _document(status, str(error))
    if isinstance(error, Invalid):
        said["errors"] = error.errors
    return said


def problem(status: int, detail: str, path: str = "", headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that ends in an error that is no ServiceError."""
    return _respond(_document(status, detail), headers or {}, path)


def _document(status: int, detail: str) -> Document:
    return {"type": "about:blank", "title": _title(status), "status": status, "detail": printable(detail)}


def _respond(said: Document, headers: Mapping[str, str], path: str, error: ServiceError | None = None) -> JSONResponse:
    headers = {"Cache-Control": "no-store", **headers}
    if path.startswith(openai.PREFIX):
        told = openai.told(said["status"], said["detail"], error, headers.get("Retry-After"))
        return JSONResponse(told.document, told.status, {**headers, **told.headers})
    content = a1111.told(said) if path.startswith(a1111.PREFIX) else said
    return JSONResponse(content, said["status"], headers, media_type="application/problem+json")


def _title(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def printable(text: str) -> str:
    """The text with escapes for unprintable characters, which clients can send."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str, most: int) -> str:
    """The text on one printable line, cut to `most` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most]}…"
