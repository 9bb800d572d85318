"""Errors as OpenAI's API tells them, with its types and codes."""

from typing import Any, NamedTuple

from service.errors import Invalid, NotBuilt, Refused, ServiceError, TooLate, UnknownModel

PREFIX = "/v1/"  # of the paths whose errors have this form

_MOST_WAIT_S = 120  # the official clients do not ask again after a longer Retry-After
_WORTH_A_RETRY = (408, 409, 429)  # with all from 500 on: after these the official clients ask again
_CODES = {401: "invalid_api_key", 405: "method_not_supported", 429: "rate_limit_exceeded"}


class Told(NamedTuple):
    """An answer.

    Attributes:
        headers: beside those that each error has.
    """

    status: int
    document: dict[str, Any]
    headers: dict[str, str]


def told(status: int, message: str, error: ServiceError | None = None, retry_after: str | None = None) -> Told:
    """An error.

    Args:
        status: in the other APIs.
        error: None for an error of the HTTP server itself, such as a path that is not there.
        retry_after: seconds after which the client may ask again; None to say nothing of it.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    code, param = _CODES.get(status), None
    match error:
        case Refused():
            status, kind, code = 400, "image_generation_user_error", "moderation_blocked"
        case UnknownModel():
            code, param = "model_not_found", "model"
        case Invalid(errors=[{"loc": [str(name), *_]}, *_]) if name != "body":
            code, param = "invalid_value", name
    if status == 429:
        kind = "requests"  # which of its limits the client has reached
    headers = {"X-Should-Retry": "false"} if _is_in_vain(status, error) else {}
    if retry_after is not None:
        headers["Retry-After"] = str(min(int(retry_after), _MOST_WAIT_S))
    return Told(status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers)


def _is_in_vain(status: int, error: ServiceError | None) -> bool:
    """Whether the same request would fail again."""
    if status < 500:
        return status not in _WORTH_A_RETRY
    return isinstance(error, NotBuilt) or (isinstance(error, TooLate) and error.even_alone)
