"""Whether times are kept, and whether short requests keep their pace.

    python -m bench.promises

Writes bench/PROMISES.md. On `small` and on the digits: promises and estimates at shares of the capacity, read from
event streams; a short request beside three very long ones; a lone request beside the bare loop; and what choosing a
pass costs. It takes about seven minutes on two cores.
"""

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import httpx

from bench.architectures import SMALL, write
from bench.bare import BareLoop, openvino_loop
from bench.load import PATIENCE, Arrival, Fields, alone, arrivals, at_their_times
from bench.servers import ROOT, Server, running
from bench.serving import machine
from service.build import BOX
from service.engine.costs import Costs
from service.engine.jobs import Job
from service.engine.scheduler import Scheduler

LONG_ENOUGH = 0.5  # seconds; estimates are judged of requests that take longer
MIXES: dict[str, list[Fields]] = {
    "small": [{"num_inference_steps": n, "num_images": k} for n, k in ((10, 1), (20, 1), (50, 1), (20, 4))],
    "digits": [
        {"num_inference_steps": n, "num_images": k, "class_label": 3} for n, k in ((15, 1), (50, 1), (15, 8), (50, 16))
    ],
}


@dataclass(frozen=True, slots=True)
class Told:
    """What a request was told when it was accepted, and what it took: seconds from then."""

    eta_s: float
    promise_s: float
    seconds: float


async def told(client: httpx.AsyncClient, request: Arrival, _: float) -> Told | None:
    """Ask for an event stream and read it to its end; None where the request is refused."""
    headers = {"Accept": "text/event-stream"}
    async with client.stream("POST", "/sample", json=request.fields, headers=headers) as response:
        if response.status_code != 200:
            return None
        name, queued, began = "", {}, 0.0
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and name == "queued":
                queued, began = json.loads(line.removeprefix("data: ")), perf_counter()
            elif line.startswith("data: ") and name == "done":
                return Told(queued["eta_s"], queued["promise_s"], perf_counter() - began)
    raise RuntimeError(f"the stream of {request.fields} ended before it was done")


def ask(server: Server, number: int, rate: float, kinds: Sequence[Fields], seed: int) -> list[Told | None]:
    return asyncio.run(at_their_times(server.url, arrivals(number, rate, kinds, seed), told))


def capacity(server: Server, kinds: Sequence[Fields]) -> float:
    """Requests a second, of which a burst makes the server do all that it can."""
    began = perf_counter()
    ask(server, 48, 1e6, kinds, seed=0)
    return 48 / (perf_counter() - began)


def promises(server: Server, name: str) -> list[str]:
    with server.awake():
        most = statistics.median(capacity(server, MIXES[name]) for _ in range(3))
        lines = []
        for share in (0.7, 0.95):
            number = max(100, round(45 * share * most))  # for 45 seconds
            outcomes = ask(server, number, share * most, MIXES[name], seed=1)
            kept = [outcome for outcome in outcomes if outcome is not None]
            on_time = sum(outcome.seconds <= outcome.promise_s for outcome in kept)
            judged = [outcome for outcome in kept if outcome.seconds > LONG_ENOUGH]
            errors = [abs(outcome.eta_s - outcome.seconds) / outcome.seconds for outcome in judged]
            error = f"{statistics.median(errors):.0%} ({len(errors)})" if errors else "none took so long"
            cells = [name, f"{share:.0%}", f"{number}", f"{number - len(kept)}", f"{on_time / len(kept):.1%}", error]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def beside_long_ones(server: Server, label: int | None) -> tuple[float, float]:
    """Median seconds of a 10-step request, alone, and beside three of 8 images and 1,000 steps."""
    fields: Fields = {} if label is None else {"class_label": label}
    with server.awake():
        solo = statistics.median(alone(server.url, 15, 10, **fields))
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            streams = []
            for seed in range(3):
                body = {"num_inference_steps": 1000, "num_images": 8, "seed": seed, **fields}
                request = client.build_request("POST", "/sample", json=body, headers={"Accept": "text/event-stream"})
                streams.append(client.send(request, stream=True))  # accepted, and left unread
            beside = statistics.median(alone(server.url, 15, 10, **fields))
            for stream in streams:
                stream.close()
    return solo, beside


def beside_the_loop(server: Server, loop: BareLoop, steps: int, rounds: int = 31) -> tuple[float, float]:
    """Median seconds of a lone request of DDIM, and of the bare loop for it, in turn."""
    served, bare = [], []
    with server.awake():
        for _ in range(rounds):
            served += alone(server.url, 1, steps, sampler="ddim")
            bare.append(loop.seconds_per_row(1, steps) * steps)
    return statistics.median(served), statistics.median(bare)


def choosing(jobs: int, rounds: int = 200) -> float:
    """Median milliseconds to choose a pass among so many jobs and to count it. Promises are short: the worst case."""
    scheduler = Scheduler(Costs({1: 0.002, 2: 0.003, 4: 0.005, 8: 0.008}), max_started=32)
    draw = random.Random(0)
    for _ in range(jobs):
        job = Job([(draw.randrange(10, 1000), draw.randrange(1, 3))] * draw.randrange(1, 9), scheduler.costs)
        scheduler.add(job, draw.random())
    seconds = []
    for _ in range(rounds):
        began = perf_counter()
        batch = scheduler.next_batch(0.0)
        seconds.append(perf_counter() - began)
        scheduler.advance(batch)
    return 1000 * statistics.median(seconds)


def section(title: str, text: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows]
    return "\n".join([f"## {title}\n", f"{text}\n", *table, ""])


def main() -> None:
    rows: list[str] = []
    short: list[str] = []
    lone: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        small = Path(work) / "small"
        write(small, SMALL)
        for name, folder, label in (("small", small, None), ("digits", BOX / "digits", 3)):
            with running(("Stepwise", "service", {"STEPWISE_WEIGHTS": str(folder)})) as [server]:
                rows += promises(server, name)
                solo, beside = beside_long_ones(server, label)
                short.append(f"| {name} | {1000 * solo:.1f} | {1000 * beside:.1f} | {beside / solo:.2f} |")
                loop = openvino_loop(folder, 1)
                for steps in (10, 50):
                    served, bare = beside_the_loop(server, loop, steps)
                    over = 1000 * (served - 1.05 * bare)
                    cells = f"{steps} | {1000 * served:.1f} | {1000 * bare:.1f} | {served / bare:.2f} | {over:+.1f}"
                    lone.append(f"| {name} | {cells} |")
    counts = (250, 500, 1000, 2000, 4000)
    report = [
        f"# Times\n\n`python -m bench.promises`, {datetime.now(UTC):%Y-%m-%d}. {machine()}\n",
        section(
            "Promises and estimates",
            "Poisson arrivals at shares of the capacity, four kinds of requests in equal parts. A promise is kept if "
            "the stream's `done` came within `promise_s` of its `queued`. An estimate's error is that of `eta_s` in "
            f"parts of the time taken, of requests that took more than {LONG_ENOUGH:g} s.",
            ("", "load", "requests", "refused", "promises kept", "error of the estimate, median (of)"),
            rows,
        ),
        section(
            "A short request beside long ones",
            "10 steps, beside three requests of 8 images and 1,000 steps.",
            ("", "alone, ms", "beside them, ms", "times"),
            short,
        ),
        section(
            "A lone request",
            "Beside the network and the update in a loop.",
            ("", "steps", "served, ms", "bare loop, ms", "times", "over 1.05 times, ms"),
            lone,
        ),
        section(
            "Choosing a pass",
            "Among jobs whose promises leave nothing to spare.",
            ("jobs in line", *(f"{jobs:,}" for jobs in counts)),
            [f"| ms | {' | '.join(f'{choosing(jobs):.2f}' for jobs in counts)} |"],
        ),
    ]
    (ROOT / "bench" / "PROMISES.md").write_text("\n".join(report))
    print("\n".join(report))


if __name__ == "__main__":
    main()
