"""Every error that a client can be told of. http/problems.py maps them to answers.

    ServiceError
    ├── NotHTTP
    ├── Unauthorized
    ├── NotAcceptable
    ├── TooSlow
    ├── BodyTooLarge
    ├── UnsupportedMedia
    │   └── UnsupportedCoding
    ├── Invalid
    ├── HeadTooLarge
    ├── ComputationFailed
    ├── Unavailable           says after how many seconds to ask again
    │   ├── Loading
    │   ├── Draining
    │   ├── Failed
    │   ├── QueueFull
    │   ├── TooLate
    │   └── ShareTaken
    └── DeadlinePassed

Messages are written for the client, and name nothing of the server.
"""

from collections.abc import Sequence
from typing import TypedDict

_MAX_TEXT = 1000


class FieldError(TypedDict):
    """One invalid field: where it is, and what is wrong with it."""

    loc: list[str | int]
    msg: str


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
    """The deadline cannot be met, or not without breaking promises.

    Attributes:
        even_alone: whether it could not be met now if there were no other request.
    """

    def __init__(self, message: str, retry_after: float = 1.0, even_alone: bool = False) -> None:
        super().__init__(message, retry_after)
        self.even_alone = even_alone


class ShareTaken(Unavailable):
    """The client holds its share of a full queue, or of the room for bodies."""


class DeadlinePassed(ServiceError):
    pass


def _shortened(error: FieldError) -> FieldError:
    """Without most of what a client sent as a name or a value of many thousands of characters."""
    loc = [_encodable(_short(part)) if isinstance(part, str) else part for part in error["loc"]]
    return {"loc": loc, "msg": _encodable(_short(error["msg"]))}


def _encodable(text: str) -> str:
    """With escapes in the place of halves of characters, which JSON can name and UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def _sentence(error: FieldError) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"]
