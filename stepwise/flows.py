"""The steps of each call, with its retries. Flows are generators: they neither send nor wait themselves.

A flow yields steps, one at a time. Client and AsyncClient do each step, and send back its outcome:

    Send  a response whose body is not yet read
    Read  the next bytes of the body, or b"" at its end
    Next  the next event of the body, or None at its end
    Wait  nothing
    Give  nothing

If Send, Read or Next fails, the client throws an httpx.RequestError into the flow.

A client may send every call again: no call changes the server, and without a seed any draw will do.
"""

import json
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
from httpx_sse import ServerSentEvent

from stepwise.errors import (
    ApiError,
    StepwiseError,
    TooManyRequests,
    Unavailable,
    Unreachable,
    from_answer,
    from_problem,
)
from stepwise.events import read_event
from stepwise.requests import Call, Request
from stepwise.results import Done, Event, ImageDone, Preview, Progress

T = TypeVar("T")

_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0
_MOST_DIGITS = 20  # of a seed, which has 64 bits at most


@dataclass(frozen=True)
class Send:
    """Send the request. A Wait separates two of these."""

    request: Request


@dataclass(frozen=True)
class Read:
    """Read the next bytes of the response."""


@dataclass(frozen=True)
class Next:
    """Read the next event of the response."""


@dataclass(frozen=True)
class Wait:
    """Close the response, and wait."""

    seconds: float


@dataclass(frozen=True)
class Give(Generic[T]):
    """Give the value to the caller."""

    value: T


Step = Send | Read | Next | Wait
Flow = Generator[Step | Give[T], Any, None]


def resume(flow: Flow[T], outcome: object) -> Step | Give[T] | None:
    """Send a step's outcome into a flow, and return the next step. None at the flow's end."""
    try:
        return flow.throw(outcome) if isinstance(outcome, httpx.RequestError) else flow.send(outcome)
    except StopIteration:
        return None


@dataclass
class Line:
    """The way to a server.

    Attributes:
        url: of the server.
        patience_s: how long a call tries a failing server again.
        now: a clock's seconds, never falling.
        proxy: the environment variable that names the proxy; None without a proxy.
        reached: whether anything has ever answered at the URL.
    """

    url: str
    patience_s: float
    now: Callable[[], float]
    proxy: str | None = None
    reached: bool = False


class BrokenStream(Exception):
    """A stream ended before its last event."""


# If nothing has ever answered, the server may not exist.
_NOT_THERE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
# Errors of the request itself, or of every answer to it: another try fails the same way.
_LASTING = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.DecodingError)

Passing = httpx.RequestError | BrokenStream | Unavailable | TooManyRequests
_PASSING = (httpx.RequestError, BrokenStream, Unavailable, TooManyRequests)  # another try may succeed


class Patience:
    """Limits the retries of a call. The time counts from the first failure since the last progress."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.renew()

    def renew(self) -> None:
        """Note progress of the call."""
        self._since: float | None = None
        self._failures = 0

    def wait_after(self, failure: Passing) -> float:
        """Seconds to wait before the next try.

        Raises:
            StepwiseError: the caller's error, if another try is useless or the wait is too long.
        """
        now = self._line.now()
        if self._since is None:
            self._since = now
        wait = _wait(failure, self._failures)
        self._failures += 1
        is_lost = isinstance(failure, _NOT_THERE) and not self._line.reached
        if is_lost or isinstance(failure, _LASTING) or now - self._since + wait > self._line.patience_s:
            raise self._told(failure) from (None if isinstance(failure, ApiError) else failure)
        return wait

    def _told(self, failure: Passing) -> StepwiseError:
        if isinstance(failure, ApiError):
            return failure
        what = str(failure) or type(failure).__name__
        if isinstance(failure, httpx.DecodingError):
            return _foreign(self._line, f"its answer cannot be read: {what}")
        if isinstance(failure, httpx.LocalProtocolError):
            return Unreachable(f"nothing can be sent to {self._line.url}: {what}")
        if isinstance(failure, _NOT_THERE):
            by = "" if self._line.proxy is None else f" through the proxy that {self._line.proxy} names"
            return Unreachable(f"no connection to {self._line.url}{by}: {what}")
        return Unreachable(f"the connection to {self._line.url} was lost: {what}")


def _wait(failure: Passing, failures: int) -> float:
    if isinstance(failure, ApiError) and failure.retry_after:
        return failure.retry_after
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**failures)
    return random.uniform(longest / 2, longest)  # random, so that clients that failed together return apart


def ask(call: Call[T], line: Line) -> Flow[T]:
    """Send a call until an answer comes, and give the answer.

    Raises:
        StepwiseError: no answer came.
    """
    patience = Patience(line)
    while True:
        try:
            response = yield from _send(call.request, line)
            body = yield from _read_all()
        except _PASSING as failure:
            wait = patience.wait_after(failure)
        else:
            break
        yield Wait(wait)
    yield Give(_understood(call.read, line)(response.headers, body))


class Story:
    """The events that the caller has, over all tries of one stream."""

    def __init__(self) -> None:
        self._images: set[int] = set()
        self._fraction = 0.0

    def is_news(self, event: Event) -> bool:
        """Whether the caller needs this event. Images that the caller has are no news, nor are their previews."""
        return not (isinstance(event, ImageDone | Preview) and event.index in self._images)

    def goes_on(self, event: Event) -> bool:
        """Note an event. Returns whether the event is progress beyond all earlier events."""
        match event:
            case ImageDone(index=index):
                self._images.add(index)
                return True
            case Progress(fraction=fraction) if fraction > self._fraction:
                self._fraction = fraction
                return True
            case _:
                return False


def watch(request: Request, line: Line) -> Flow[Event]:
    """Give the events of a request until it is done. After a break, ask again with the same seed.

    Raises:
        StepwiseError: the request fails, or an event reports an error.
    """
    patience, story = Patience(line), Story()
    while True:
        try:
            response = yield from _send(request, line)
            if (seed := response.headers.get("x-seed", "")).isdecimal() and len(seed) <= _MOST_DIGITS:
                request = request.with_seed(int(seed))
            yield from _follow(response, line, story, patience)
        except _PASSING as failure:
            wait = patience.wait_after(failure)
        else:
            return
        yield Wait(wait)


def _follow(response: httpx.Response, line: Line, story: Story, patience: Patience) -> Flow[Event]:
    read = _understood(read_event, line)
    while sent := (yield Next()):
        if sent.event == "error":
            raise _understood(_failure, line)(sent, response.headers.get("x-request-id"))
        event = read(sent)
        if event is None or not story.is_news(event):
            continue
        if story.goes_on(event):
            patience.renew()
        yield Give(event)
        if isinstance(event, Done):
            return
    raise BrokenStream("the stream ended before its last event")


def _failure(sent: ServerSentEvent, request_id: str | None) -> ApiError:
    problem = json.loads(sent.data)
    return from_problem(problem["status"], problem, request_id)


def _send(request: Request, line: Line) -> Generator[Send | Read, Any, httpx.Response]:
    """The response to a request, in the media type that the request accepts. Its body is still unread.

    Raises:
        ApiError: the response is an error.
    """
    try:
        response: httpx.Response = yield Send(request)
    except httpx.RemoteProtocolError as error:
        if _is_nonsense(error):
            raise _foreign(line, f"what it says is no HTTP: {error}") from error
        raise
    line.reached = True
    if not response.is_success:
        raise from_answer(response.status_code, response.headers, (yield from _read_all()))
    media_type = response.headers.get("content-type", "").split(";")[0]
    if media_type != request.accept:
        raise _foreign(line, f"it answers {media_type or 'nothing'}, and not {request.accept}")
    return response


def _read_all() -> Generator[Read, Any, bytes]:
    pieces: list[bytes] = []
    while piece := (yield Read()):
        pieces.append(piece)
    return b"".join(pieces)


def _understood(read: Callable[..., T], line: Line) -> Callable[..., T]:
    """`read`, with one kind of error for every answer that is not as in docs/api.md."""

    def understood(*args: object) -> T:
        try:
            return read(*args)
        except Exception as error:  # NumPy and json raise errors of many kinds
            raise _foreign(line, f"its answer cannot be read: {error!r}") from error

    return understood


def _is_nonsense(error: BaseException | None) -> bool:
    """Whether the answer is no HTTP. httpx raises the same error for an answer that is cut short."""
    while error is not None:
        if isinstance(error, httpx.InvalidURL) or type(error).__module__.startswith("h11."):
            return True
        error = error.__context__
    return False


def _foreign(line: Line, why: str) -> Unreachable:
    return Unreachable(f"{line.url} is no Stepwise server: {why}")
