"""Every error that a client can be told of. http/problems.py maps them to answers.

    ServiceError
    ├── NotHTTP
    ├── Unauthorized
    ├── UnknownModel
    ├── UnknownSampler
    ├── NotAcceptable
    ├── TooSlow
    ├── BodyTooLarge
    ├── UnsupportedMedia
    │   └── UnsupportedCoding
    ├── Invalid
    │   └── TooManyImages
    ├── HeadTooLarge
    ├── Refused
    ├── ComputationFailed
    ├── NotBuilt
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
    """One invalid field: its place, and the complaint."""

    loc: list[str | int]
    msg: str


class ServiceError(Exception):
    """The root of all errors. The message is written for the client."""


class NotHTTP(ServiceError):
    pass


class Unauthorized(ServiceError):
    pass


class UnknownModel(ServiceError):
    """The address names a model that is not served."""


class UnknownSampler(ServiceError):
    """A program for AUTOMATIC1111's API names a sampler that is not served."""


class NotAcceptable(ServiceError):
    pass


class TooSlow(ServiceError):
    """The whole request did not arrive in time."""


class BodyTooLarge(ServiceError):
    pass


class UnsupportedMedia(ServiceError):
    pass


class UnsupportedCoding(UnsupportedMedia):
    """The body has a Content-Encoding."""


class Invalid(ServiceError):
    """Invalid input. `errors` names each invalid field."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        self.errors = [_shortened(error) for error in errors]
        super().__init__("; ".join(_sentence(error) for error in self.errors))

    @classmethod
    def field(cls, name: str, msg: str) -> "Invalid":
        return cls([{"loc": [name], "msg": msg}])


class TooManyImages(Invalid):
    """A request has several images to draw from, and may have one."""


class HeadTooLarge(ServiceError):
    """The address and the headers are too large."""


class Refused(ServiceError):
    """A check of the operator refuses the prompt or the image."""


class ComputationFailed(ServiceError):
    """A computation of this request failed, or its image is not finite."""


class NotBuilt(ServiceError):
    """An API that this server speaks has this, and this server does not."""


class Unavailable(ServiceError):
    """The server cannot answer now.

    Attributes:
        retry_after: seconds after which another try makes sense.
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
    """The queue of requests is full, or the room for their bodies."""


class TooLate(Unavailable):
    """The request cannot meet its deadline, or only by breaking promises.

    Attributes:
        even_alone: the request would miss its deadline now even without other requests.
    """

    def __init__(self, message: str, retry_after: float = 1.0, even_alone: bool = False) -> None:
        super().__init__(message, retry_after)
        self.even_alone = even_alone


class ShareTaken(Unavailable):
    """The client holds its share of the full queue, or of the room for bodies."""


class DeadlinePassed(ServiceError):
    pass


def _shortened(error: FieldError) -> FieldError:
    """The error with long texts cut. A client can send a name or a value of many thousands of characters."""
    loc = [_encodable(_short(part)) if isinstance(part, str) else part for part in error["loc"]]
    return {"loc": loc, "msg": _encodable(_short(error["msg"]))}


def _encodable(text: str) -> str:
    """The text with escapes for lone surrogates. JSON can name them, and UTF-8 cannot encode them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def _sentence(error: FieldError) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"]
