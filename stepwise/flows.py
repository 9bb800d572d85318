"""How a call goes, whatever goes wrong on the way: as generators, which neither send nor wait themselves.

A flow yields steps, one at a time: Send is answered by a response whose body is not yet read, Read by its next bytes
(b"" at its end), Wait and Give by nothing. What goes wrong with Send and Read is thrown in as an httpx.RequestError.
Client and AsyncClient do the steps, each in its own way.

All calls may be sent again: none changes anything on the server, and without a seed another draw is as good.
"""

import json
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from stepwise.errors import (
    ApiError,
    StepwiseError,
    TooManyRequests,
    Unavailable,
    Unreachable,
    from_answer,
    from_problem,
)
from stepwise.events import Message, Parser, read_event
from stepwise.requests import Call, Request
from stepwise.results import Event, ImageDone, Preview, Progress

T = TypeVar("T")

_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0
_MOST_DIGITS = 20  # of a seed, which has 64 bits at most


@dataclass(frozen=True)
class Send:
    """Send this. Where it is not the first, there was a Wait before."""

    request: Request


@dataclass(frozen=True)
class Read:
    """Read on in the response."""


@dataclass(frozen=True)
class Wait:
    """Close the response, and wait."""

    seconds: float


@dataclass(frozen=True)
class Give(Generic[T]):
    """Hand this to whoever called."""

    value: T


Step = Send | Read | Wait
Flow = Generator[Step | Give[T], Any, None]


def resume(flow: Flow[T], outcome: object) -> Step | Give[T] | None:
    """The next step of a flow, after what came of the one before; None where it is over."""
    try:
        return flow.throw(outcome) if isinstance(outcome, httpx.RequestError) else flow.send(outcome)
    except StopIteration:
        return None


@dataclass
class Line:
    """The way to a server.

    Attributes:
        url: where it is.
        patience_s: for how long one that fails is asked again.
        now: seconds, of a clock that only goes on.
        proxy: the variable that names the proxy on the way, if there is one.
        reached: whether something has ever answered there.
    """

    url: str
    patience_s: float
    now: Callable[[], float]
    proxy: str | None = None
    reached: bool = False


class BrokenStream(Exception):
    """It ended before its last event."""


# Where nothing has answered yet, nothing may be there at all.
_NOT_THERE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
# What this client does, or what comes of any answer: the next time is no better.
_LASTING = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.DecodingError)

Passing = httpx.RequestError | BrokenStream | Unavailable | TooManyRequests
_PASSING = (httpx.RequestError, BrokenStream, Unavailable, TooManyRequests)  # what may be over when asked again


class Patience:
    """How long a call goes on asking, from its first failure since it last came further."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.renew()

    def renew(self) -> None:
        """The call has come further."""
        self._since: float | None = None
        self._failures = 0

    def wait_after(self, failure: Passing) -> float:
        """Seconds until it makes sense to ask again.

        Raises:
            StepwiseError: what the failure is to whoever called, where it does not, or where that is too long.
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
    return random.uniform(longest / 2, longest)  # so that those who were lost together do not come back together


def ask(call: Call[T], line: Line) -> Flow[T]:
    """Ask until there is an answer, and give it.

    Raises:
        StepwiseError: that there is none.
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
    """What a stream has told, over all times that it was asked for."""

    def __init__(self) -> None:
        self._images: set[int] = set()
        self._step = 0

    def is_news(self, event: Event) -> bool:
        """Whether this is worth telling: no image that was told of, and no preview of it."""
        return not (isinstance(event, ImageDone | Preview) and event.index in self._images)

    def goes_on(self, event: Event) -> bool:
        """Note an event; whether it is further than any before."""
        match event:
            case ImageDone(index=index):
                self._images.add(index)
                return True
            case Progress(step=step) if step > self._step:
                self._step = step
                return True
            case _:
                return False


def watch(request: Request, line: Line) -> Flow[Event]:
    """Give the events of a request until it is done. A stream that breaks is asked for again, by its seed.

    Raises:
        StepwiseError: that it fails, also as an event.
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
    parser, read = Parser(), _understood(read_event, line)
    while piece := (yield Read()):
        for message in parser.feed(piece):
            if message.name == "error":
                raise _understood(_failure, line)(message, response.headers.get("x-request-id"))
            event = read(message)
            if event is None or not story.is_news(event):
                continue
            if story.goes_on(event):
                patience.renew()
            yield Give(event)
            if message.name == "done":
                return
    raise BrokenStream("the stream ended before its last event")


def _failure(message: Message, request_id: str | None) -> ApiError:
    problem = json.loads(message.data)
    return from_problem(problem["status"], problem, request_id)


def _send(request: Request, line: Line) -> Generator[Send | Read, Any, httpx.Response]:
    """The response, whose body is to be read, of the media type that was asked for.

    Raises:
        ApiError: that it is an error.
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
    """`read`, which complains of a server that does not answer as docs/api.md says."""

    def understood(*args: object) -> T:
        try:
            return read(*args)
        except Exception as error:  # NumPy and json have many kinds for what is broken
            raise _foreign(line, f"its answer cannot be read: {error!r}") from error

    return understood


def _is_nonsense(error: BaseException | None) -> bool:
    """Whether an answer cannot be parsed, rather than cut short, which httpx calls by the same name."""
    while error is not None:
        if isinstance(error, httpx.InvalidURL) or type(error).__module__.startswith("h11."):
            return True
        error = error.__context__
    return False


def _foreign(line: Line, why: str) -> Unreachable:
    return Unreachable(f"{line.url} is no Stepwise server: {why}")
