"""Client and AsyncClient: they send the calls of requests.py over httpx, by the steps of flows.py.

Both have the same methods, made from the same functions.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, get_args

import httpx
from httpx_sse import EventSource, ServerSentEvent

from stepwise import requests
from stepwise.errors import Unreachable
from stepwise.flows import Flow, Give, Line, Next, Read, Send, Step, Wait, ask, resume, watch
from stepwise.requests import Call, Request
from stepwise.results import Event
from stepwise.way import way_to

P = ParamSpec("P")
T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])

DEFAULT_URL = "http://127.0.0.1:8000"

_CONNECT_S = 10.0
_WRITE_S = 60.0
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=100)


class Clock:
    """Real time. Tests use clocks of their own."""

    def now(self) -> float:
        """Seconds from an arbitrary start."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


# The methods of each client, made from the calls of requests.py.


def _asks(make: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        [answer] = self._given(ask(make(*args, **kwargs), self._line))
        return answer

    return _described(method, make, _answer(make))


def _watches(make: Callable[P, Request]) -> "Callable[Concatenate[Client, P], Generator[Event, None, None]]":
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Generator[Event, None, None]:
        return self._given(watch(make(*args, **kwargs), self._line))

    return _described(method, make, Iterator[Event])


def _asks_async(make: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        [answer] = [answer async for answer in self._given(ask(make(*args, **kwargs), self._line))]
        return answer

    return _described(method, make, _answer(make))


def _watches_async(make: Callable[P, Request]) -> "Callable[Concatenate[AsyncClient, P], AsyncGenerator[Event, None]]":
    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Event, None]:
        return self._given(watch(make(*args, **kwargs), self._line))

    return _described(method, make, AsyncIterator[Event])


def _answer(make: Callable[..., Call[T]]) -> object:
    [answer] = get_args(inspect.signature(make).return_annotation)
    return answer


def _described(method: Method, make: Callable[..., object], answer: object) -> Method:
    """Give a method the name, the arguments and the docstring of `make`, for `help` and editors."""
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    asked = inspect.signature(make)
    described = asked.replace(parameters=[this, *asked.parameters.values()], return_annotation=answer)
    method.__name__ = method.__qualname__ = make.__name__
    method.__doc__ = make.__doc__
    method.__signature__ = described  # type: ignore[attr-defined]
    return method


class Client:
    """A client of a Stepwise server. Threads may share a client.

    Without an answer, every method raises a StepwiseError: Unreachable, or an ApiError with the reason.

    Args:
        url: of the server.
        api_key: of the server, if it needs one.
        patience_s: how long a call tries again after 429, 502, 503 and lost connections; 0 for never. A call waits as
            Retry-After says, or else with growing pauses. The progress of a stream starts this time anew. A call does
            not wait for a server that has never answered.
        transport: replaces httpx's own.

    The client uses the proxies and certificates of the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY,
    SSL_CERT_FILE, SSL_CERT_DIR. It calls a server on this machine without a proxy.

    Raises:
        Unreachable: `url` is no http or https URL, or the environment or the key cannot be used.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        patience_s: float = 120.0,
        transport: httpx.BaseTransport | None = None,
        _clock: Clock | None = None,
    ) -> None:
        self._clock = _clock or Clock()
        base_url, headers, variable = _checked(url), _headers(api_key), None
        if transport is None:
            way = way_to(base_url)
            transport = httpx.HTTPTransport(verify=way.tls, proxy=way.proxy, limits=_LIMITS)
            variable = way.variable
        self._line = Line(url, patience_s, self._clock.now, variable)
        self._http = httpx.Client(base_url=base_url, headers=headers, transport=transport, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    info = _asks(requests.info)
    sample = _asks(requests.sample)
    sample_array = _asks(requests.sample_array)
    sample_picture = _asks(requests.sample_picture)
    stream = _watches(requests.stream)
    denoise = _asks(requests.denoise)
    stream_denoise = _watches(requests.stream_denoise)
    denoise_array = _asks(requests.denoise_array)
    noise = _asks(requests.noise)
    noise_array = _asks(requests.noise_array)

    def _given(self, flow: Flow[T]) -> Generator[T, None, None]:
        """Yield the values that a flow gives, and do its other steps."""
        with closing(_Wire(self._http, self._clock)) as wire:
            outcome: object = None
            while (step := resume(flow, outcome)) is not None:
                if isinstance(step, Give):
                    yield step.value
                    outcome = None
                else:
                    outcome = wire.do(step)


class AsyncClient:
    """A client for asyncio, with the arguments and methods of Client.

    To leave a stream early, use `contextlib.aclosing`, which closes the connection at once.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        patience_s: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
        _clock: Clock | None = None,
    ) -> None:
        self._clock = _clock or Clock()
        base_url, headers, variable = _checked(url), _headers(api_key), None
        if transport is None:
            way = way_to(base_url)
            transport = httpx.AsyncHTTPTransport(verify=way.tls, proxy=way.proxy, limits=_LIMITS)
            variable = way.variable
        self._line = Line(url, patience_s, self._clock.now, variable)
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, transport=transport, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    info = _asks_async(requests.info)
    sample = _asks_async(requests.sample)
    sample_array = _asks_async(requests.sample_array)
    sample_picture = _asks_async(requests.sample_picture)
    stream = _watches_async(requests.stream)
    denoise = _asks_async(requests.denoise)
    stream_denoise = _watches_async(requests.stream_denoise)
    denoise_array = _asks_async(requests.denoise_array)
    noise = _asks_async(requests.noise)
    noise_array = _asks_async(requests.noise_array)

    async def _given(self, flow: Flow[T]) -> AsyncGenerator[T, None]:
        """Yield the values that a flow gives, and do its other steps."""
        async with aclosing(_AsyncWire(self._http, self._clock)) as wire:
            outcome: object = None
            while (step := resume(flow, outcome)) is not None:
                if isinstance(step, Give):
                    yield step.value
                    outcome = None
                else:
                    outcome = await wire.do(step)


Outcome = httpx.Response | bytes | ServerSentEvent | httpx.RequestError | None


class _Wire:
    """Does the steps of a flow, and holds the present response."""

    def __init__(self, http: httpx.Client, clock: Clock) -> None:
        self._http = http
        self._clock = clock
        self._response: httpx.Response | None = None
        self._pieces: Iterator[bytes]
        self._events: Iterator[ServerSentEvent]

    def do(self, step: Step) -> Outcome:
        """Do a step, and return its outcome."""
        built = _built(self._http, step.request) if isinstance(step, Send) else None
        try:
            match step:
                case Send():
                    assert built
                    self._response = self._http.send(built, stream=True)
                    self._pieces = self._response.iter_bytes()
                    self._events = EventSource(self._response).iter_sse()
                    return self._response
                case Read():
                    return next(self._pieces, b"")
                case Next():
                    return next(self._events, None)
                case Wait(seconds):
                    self.close()
                    self._clock.sleep(seconds)
        except Exception as error:  # httpx lets some errors of the libraries below through
            return _as_request_error(error)
        return None

    def close(self) -> None:
        if self._response is not None:
            self._response.close()


class _AsyncWire:
    """As _Wire, for asyncio."""

    def __init__(self, http: httpx.AsyncClient, clock: Clock) -> None:
        self._http = http
        self._clock = clock
        self._response: httpx.Response | None = None
        self._pieces: AsyncIterator[bytes]
        self._events: AsyncIterator[ServerSentEvent]

    async def do(self, step: Step) -> Outcome:
        """Do a step, and return its outcome."""
        built = _built(self._http, step.request) if isinstance(step, Send) else None
        try:
            match step:
                case Send():
                    assert built
                    self._response = await self._http.send(built, stream=True)
                    self._pieces = self._response.aiter_bytes()
                    self._events = EventSource(self._response).aiter_sse()
                    return self._response
                case Read():
                    return await anext(self._pieces, b"")
                case Next():
                    return await anext(self._events, None)
                case Wait(seconds):
                    await self.aclose()
                    await self._clock.wait(seconds)
        except Exception as error:  # httpx lets some errors of the libraries below through
            return _as_request_error(error)
        return None

    async def aclose(self) -> None:
        if self._response is not None:
            await self._response.aclose()


def _built(http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
    # No time limit for a free connection: many calls of one client take turns.
    timeout = httpx.Timeout(connect=_CONNECT_S, read=request.silence_s, write=_WRITE_S, pool=None)
    return http.build_request(
        request.method, request.path, content=request.content, headers=request.headers, timeout=timeout
    )


def _as_request_error(error: Exception) -> httpx.RequestError:
    """The error as an httpx.RequestError. An error of another library becomes a kind that is not tried again."""
    if isinstance(error, httpx.RequestError):
        return error
    first: BaseException = error
    while isinstance(first, BaseExceptionGroup):  # anyio's
        first = first.exceptions[0]
    known = httpx.LocalProtocolError(f"{type(first).__name__}: {first}")
    known.__cause__ = error
    return known


def _checked(url: str) -> httpx.URL:
    try:
        checked = httpx.URL(url)
        host, port = checked.host, checked.port
    except (httpx.InvalidURL, ValueError) as error:
        raise Unreachable(f"{url!r} is no URL: {error}") from None
    if checked.scheme not in ("http", "https") or not host:
        raise Unreachable(f"a server's URL begins with http:// or https:// and a host, and this is {url!r}")
    if port is not None and not 0 < port < 65536:
        raise Unreachable(f"{url!r} is no URL: a port is 1 to 65535, and this is {port}")
    return checked


def _headers(api_key: str | None) -> dict[bytes, bytes]:
    if api_key is None:
        return {}
    key = api_key.strip()
    try:
        encoded = f"Bearer {key}".encode()
    except UnicodeEncodeError:
        encoded = b"\0"
    if not key or any(byte < 0x20 or byte == 0x7F for byte in encoded):
        raise Unreachable("the API key cannot be sent: it is empty, or has a line break or another control character")
    return {b"Authorization": encoded}
