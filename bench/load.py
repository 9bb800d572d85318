"""Load on a server. In an open loop, requests come at fixed times; in a closed loop, clients wait for their answers."""

import asyncio
import contextlib
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from time import perf_counter
from typing import TypeVar

import httpx

PATIENCE = 600.0  # seconds

Fields = Mapping[str, object]  # of a request
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A future request: its seconds from the start, and its fields."""

    at: float
    fields: Fields


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a request: seconds from its arrival to its answer, waiting included."""

    num_inference_steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Load:
    """The results of all requests, and the seconds from the start to the last answer."""

    outcomes: Sequence[Outcome]
    seconds: float

    @property
    def images_per_s(self) -> float:
        return len(self.outcomes) / self.seconds


def arrivals(number: int, rate: float, kinds: Sequence[Fields], seed: int) -> list[Arrival]:
    """`number` arrivals at `rate` a second, each with a seed. All kinds come equally often, in random order."""
    draw = random.Random(seed)
    mixed = [kinds[i % len(kinds)] for i in range(number)]
    draw.shuffle(mixed)
    at, made = 0.0, []
    for fields in mixed:
        at += draw.expovariate(rate)
        made.append(Arrival(at, {**fields, "seed": draw.randrange(2**31)}))
    return made


async def at_their_times(
    url: str, requests: Sequence[Arrival], send: Callable[[httpx.AsyncClient, Arrival, float], Awaitable[T]]
) -> list[T]:
    """Send each request at its time, whether or not others are answered. `send` also gets that time."""
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as client:
        start = perf_counter()

        async def one(request: Arrival) -> T:
            await asyncio.sleep(max(0.0, start + request.at - perf_counter()))
            return await send(client, request, start + request.at)

        return await asyncio.gather(*map(one, requests))


async def _answered(client: httpx.AsyncClient, request: Arrival, arrived: float) -> Outcome:
    response = await client.post("/sample", json=request.fields)
    seconds = perf_counter() - arrived
    if response.status_code != 200:
        raise RuntimeError(f"{client.base_url} answered {response.status_code}: {response.text[:200]}")
    return Outcome(int(str(request.fields["num_inference_steps"])), seconds)


def _load(url: str, requests: Sequence[Arrival]) -> Load:
    """Send requests to POST {url}/sample at their times.

    Raises:
        RuntimeError: if a status is not 200.
    """
    began = perf_counter()
    outcomes = asyncio.run(at_their_times(url, requests, _answered))
    return Load(outcomes, perf_counter() - began)


def at_once(url: str, number: int, steps: Sequence[int], seed: int, **fields: object) -> Load:
    """Send a burst. The server always has enough work, so this measures its capacity."""
    return _load(url, arrivals(number, 1e6, [{"num_inference_steps": n, **fields} for n in steps], seed))


def poisson(url: str, number: int, rate: float, steps: Sequence[int], seed: int) -> Load:
    return _load(url, arrivals(number, rate, [{"num_inference_steps": n} for n in steps], seed))


def alone(url: str, number: int, num_inference_steps: int, **fields: object) -> list[float]:
    """Seconds of requests sent one after the other, over one connection.

    The client is minimal, so it adds little.
    """
    with contextlib.closing(HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)) as connection:
        connection.connect()
        seconds = []
        for seed in range(number):
            body = json.dumps({"num_inference_steps": num_inference_steps, "seed": seed, **fields})
            began = perf_counter()
            connection.request("POST", "/sample", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            seconds.append(perf_counter() - began)
            if response.status != 200:
                raise RuntimeError(f"{url} answered {response.status}: {answer[:200]!r}")
    return seconds


def closed_loop(url: str, requests: Sequence[Fields], clients: int) -> float:
    """Seconds until all requests are answered. Each client has its own connection and one request in flight.

    The clients share the cores with the server, so they do as little as possible.

    Raises:
        RuntimeError: if a status is not 200.
    """

    async def run() -> None:
        waiting = iter(requests)  # shared by the clients
        await asyncio.gather(*(_client(url, waiting) for _ in range(clients)))

    began = perf_counter()
    asyncio.run(run())
    return perf_counter() - began


async def _client(url: str, waiting: Iterator[Fields]) -> None:
    """Send request after request until none is left."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for fields in waiting:
            body = json.dumps(fields).encode()
            accept = "image/png" if fields.get("num_images", 1) == 1 else "application/zip"
            writer.write(
                f"POST /sample HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = await reader.readexactly(length)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{url} answered {head[:40]!r}: {answer[:200]!r}")
    finally:
        writer.close()
        await writer.wait_closed()


def percentile(values: Sequence[float], q: float) -> float:
    """A percentile by the nearest rank."""
    rising = sorted(values)
    return rising[min(len(rising) - 1, int(q * len(rising)))]
