"""Every error of the client, and the one map from statuses to them.

StepwiseError
├── Unreachable            no connection, or no Stepwise server answers
└── ApiError               the server's problem document, RFC 9457
    ├── BadRequest         3xx and 4xx, if nothing below
    ├── Unauthorized       401
    ├── Invalid            422
    ├── TooManyRequests    429
    ├── ServerFailed       5xx, if nothing below
    ├── Unavailable        502, 503
    └── DeadlinePassed     504
"""

import http
import json
from collections.abc import Mapping
from typing import Any, TypedDict

PROBLEM = "application/problem+json"

_MAX_TEXT = 200  # characters of an answer that is no problem document


class FieldError(TypedDict):
    """One invalid field: its place, and the complaint."""

    loc: list[str | int]
    msg: str


class StepwiseError(Exception):
    """The root of all errors. The message is a sentence for the caller."""


class Unreachable(StepwiseError):
    """The client cannot connect, or lost the connection for good, or no Stepwise server answers."""


class ApiError(StepwiseError):
    """The server's own answer: an error.

    Attributes:
        status: of HTTP.
        problem: the problem document as the server sent it.
        request_id: the request's id in the server's log.
        retry_after: the server's seconds until another try makes sense; None without any.
    """

    def __init__(
        self,
        status: int,
        problem: Mapping[str, Any],
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, problem, request_id, retry_after)
        self.status = status
        self.problem = dict(problem)
        self.request_id = request_id
        self.retry_after = retry_after

    @property
    def title(self) -> str:
        """The kind of the problem, in a few words."""
        return str(self.problem.get("title") or _phrase(self.status))

    @property
    def detail(self) -> str:
        """The problem of this request."""
        return str(self.problem.get("detail") or self.title)

    @property
    def errors(self) -> list[FieldError]:
        """The invalid fields and the complaints. Empty if the problem is not about fields."""
        told = self.problem.get("errors")
        return [error for error in told if _is_field_error(error)] if isinstance(told, list) else []

    def __str__(self) -> str:
        more = [error for error in self.errors if error["msg"] not in self.detail]
        return "; ".join([self.detail, *(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in more)])


class BadRequest(ApiError):
    """The request is at fault. Another try would fail too."""


class Unauthorized(ApiError):
    """The server needs an API key, and the request has none that the server knows."""


class Invalid(ApiError):
    """Fields are out of range, or even an idle server could not do the work in time. See `errors`."""


class TooManyRequests(ApiError):
    """The queue is full, and this client holds its share of the places."""


class ServerFailed(ApiError):
    """The computation of this request failed."""


class Unavailable(ApiError):
    """Not now: the server is full, loading or draining, or its balancer cannot reach it."""


class DeadlinePassed(ApiError):
    """`timeout_s` ended while the request waited or ran."""


_KINDS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    422: Invalid,
    429: TooManyRequests,
    502: Unavailable,
    503: Unavailable,
    504: DeadlinePassed,
}


def from_problem(
    status: int, problem: Mapping[str, Any], request_id: str | None = None, retry_after: float | None = None
) -> ApiError:
    """The error for a problem document."""
    kind = _KINDS.get(status, BadRequest if status < 500 else ServerFailed)
    return kind(status, problem, request_id, retry_after)


def from_answer(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The error for an answer. The answer may come from a proxy.

    Args:
        headers: with names in lower case.
    """
    return from_problem(status, _document(status, headers, body), headers.get("x-request-id"), _retry_after(headers))


def _document(status: int, headers: Mapping[str, str], body: bytes) -> Mapping[str, Any]:
    text = body.decode("utf-8", "replace")
    if headers.get("content-type", "").split(";")[0] == PROBLEM:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        if isinstance(document, dict):
            return document
    said = " ".join(text.split())
    shown = said if len(said) <= _MAX_TEXT else said[: _MAX_TEXT - 3] + "..."
    what = f"the answer is {status} {_phrase(status)}"
    if location := headers.get("location"):
        what += f", to {location[:_MAX_TEXT]}"
    return {"title": _phrase(status), "status": status, "detail": f"{what}: {shown}" if shown else what}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of Retry-After. RFC 9110 also allows dates. They are ignored, because clocks differ."""
    text = headers.get("retry-after", "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _is_field_error(error: object) -> bool:
    return isinstance(error, dict) and isinstance(error.get("loc"), list) and isinstance(error.get("msg"), str)


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"
