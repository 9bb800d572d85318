"""Open-loop load: requests arrive as a Poisson process, whatever the server does with them."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import httpx

PATIENCE = 600.0  # seconds


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: seconds from the start, and what it asks for."""

    at: float
    num_inference_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one: seconds from its arrival, waiting included, to its answer."""

    num_inference_steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Load:
    """What became of all, and the seconds from the start to the last answer."""

    outcomes: Sequence[Outcome]
    seconds: float

    @property
    def images_per_s(self) -> float:
        return len(self.outcomes) / self.seconds


def arrivals(number: int, rate: float, steps: Sequence[int], seed: int) -> list[Arrival]:
    """So many arrivals at `rate` a second. Each number of steps comes equally often, in random order."""
    draw = random.Random(seed)
    mixed = [steps[i % len(steps)] for i in range(number)]
    draw.shuffle(mixed)
    at, made = 0.0, []
    for num_inference_steps in mixed:
        at += draw.expovariate(rate)
        made.append(Arrival(at, num_inference_steps, draw.randrange(2**31)))
    return made


async def ask(url: str, requests: Sequence[Arrival], fields: Mapping[str, object]) -> Load:
    """Send requests to POST {url}/sample at their times, each with these fields too.

    Raises:
        RuntimeError: where one is not answered 200.
    """
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as client:
        start = perf_counter()

        async def one(request: Arrival) -> Outcome:
            await asyncio.sleep(max(0.0, start + request.at - perf_counter()))
            body = {"num_inference_steps": request.num_inference_steps, "seed": request.seed, **fields}
            response = await client.post("/sample", json=body)
            seconds = perf_counter() - start - request.at
            if response.status_code != 200:
                raise RuntimeError(f"{url} answered {response.status_code}: {response.text[:200]}")
            return Outcome(request.num_inference_steps, seconds)

        outcomes = await asyncio.gather(*map(one, requests))
        return Load(outcomes, perf_counter() - start)


def at_once(url: str, number: int, steps: Sequence[int], seed: int, **fields: object) -> Load:
    """A burst: the server has all the work that it could wish for, so this is its capacity."""
    return asyncio.run(ask(url, arrivals(number, 1e6, steps, seed), fields))


def poisson(url: str, number: int, rate: float, steps: Sequence[int], seed: int) -> Load:
    return asyncio.run(ask(url, arrivals(number, rate, steps, seed), {}))


def alone(url: str, number: int, num_inference_steps: int, **fields: object) -> list[float]:
    """Seconds of requests that are sent one after the other, over one connection."""
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        seconds = []
        for seed in range(number):
            began = perf_counter()
            body = {"num_inference_steps": num_inference_steps, "seed": seed, **fields}
            response = client.post("/sample", json=body)
            response.raise_for_status()
            seconds.append(perf_counter() - began)
    return seconds


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest rank."""
    rising = sorted(values)
    return rising[min(len(rising) - 1, int(q * len(rising)))]
