"""Every error of the client, and the one map from statuses to them.

StepwiseError
├── Unreachable            no connection, or what answers is no Stepwise server
└── ApiError               what the server says: a problem document, RFC 9457
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
    """One invalid field: where it is, and what is wrong with it."""

    loc: list[str | int]
    msg: str


class StepwiseError(Exception):
    """The root. Its text is a sentence for whoever asked."""


class Unreachable(StepwiseError):
    """There is no connection to the server, or it was lost and did not come back, or no Stepwise server answers."""


class ApiError(StepwiseError):
    """The server's own answer.

    Attributes:
        status: of HTTP.
        problem: the problem document as it came.
        request_id: by which the server's log knows the request.
        retry_after: seconds after which it makes sense to ask again, where the server said so.
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
        """What kind of problem it is, in few words."""
        return str(self.problem.get("title") or _phrase(self.status))

    @property
    def detail(self) -> str:
        """What is the matter with this request."""
        return str(self.problem.get("detail") or self.title)

    @property
    def errors(self) -> list[FieldError]:
        """The fields that are wrong, and why; none where it is not about fields."""
        told = self.problem.get("errors")
        return [error for error in told if _is_field_error(error)] if isinstance(told, list) else []

    def __str__(self) -> str:
        more = [error for error in self.errors if error["msg"] not in self.detail]
        return "; ".join([self.detail, *(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in more)])


class BadRequest(ApiError):
    """The request is at fault, and would be again."""


class Unauthorized(ApiError):
    """The server wants an API key, and has not got one that it knows."""


class Invalid(ApiError):
    """Fields are out of range, or the work could not be done in time even by an idle server; see `errors`."""


class TooManyRequests(ApiError):
    """The queue is full, and this client holds its share of it."""


class ServerFailed(ApiError):
    """The computation of this request failed."""


class Unavailable(ApiError):
    """Not now: the server is full, loading or leaving, or its balancer has lost it."""


class DeadlinePassed(ApiError):
    """`timeout_s` passed while the request waited or ran."""


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
    """The error that a problem document stands for."""
    kind = _KINDS.get(status, BadRequest if status < 500 else ServerFailed)
    return kind(status, problem, request_id, retry_after)


def from_answer(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The error that an answer stands for, which need not come from a Stepwise server: proxies have their own.

    Args:
        headers: whose names are found in lower case.
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
    """Seconds; a date, which RFC 9110 allows too, is not read: clocks differ."""
    text = headers.get("retry-after", "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _is_field_error(error: object) -> bool:
    return isinstance(error, dict) and isinstance(error.get("loc"), list) and isinstance(error.get("msg"), str)


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"
