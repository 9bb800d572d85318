"""Measure whether promises are kept, and whether short requests stay fast.

    python -m bench.promises

Measures, with `small`, with the digits, with a server of two sizes and with a small Stable Diffusion: promises and
estimates at shares of the capacity, read from event streams. With the first three also a short request beside three
very long ones. With the first two also a lone request beside the bare loop. Then the time to choose a pass. Writes
bench/figures/promises.json, which bench/PROMISES.md shows. Takes about eleven minutes on two cores.
"""

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import perf_counter

import httpx

from bench import record
from bench.architectures import CONVOLUTIONS, SMALL, write, write_text
from bench.bare import BareLoop, openvino_loop
from bench.load import PATIENCE, Arrival, Fields, alone, arrivals, at_their_times
from bench.machine import machine
from bench.servers import Server, running
from model.rows import Group
from service.build import BOX
from service.engine.admission import Line, admit, earliest_promise
from service.engine.arrivals import Arrivals
from service.engine.costs import Costs, Machine, Speed
from service.engine.fairness import Places
from service.engine.jobs import Job
from service.engine.scheduler import Scheduler
from service.engine.stage_work import StageWork

LONG_ENOUGH = 0.5  # seconds; only estimates for longer requests are judged
ROUNDS = 31  # of a lone request
LARGE: Fields = {"width": 512, "height": 512}  # a PNG of 0.5 MB
SIZES = "64x64,512x512"
MIXES: dict[str, list[Fields]] = {
    "small": [{"num_inference_steps": n, "num_images": k} for n, k in ((10, 1), (20, 1), (50, 1), (20, 4))],
    "digits": [
        {"num_inference_steps": n, "num_images": k, "class_label": 3} for n, k in ((15, 1), (50, 1), (15, 8), (50, 16))
    ],
    "two sizes": [
        {"num_inference_steps": n, "num_images": k, **size}
        for n, k, size in ((20, 1, {}), (50, 8, {}), (1, 1, LARGE), (1, 8, LARGE))
    ],
    "prompts": [
        {"num_inference_steps": n, "num_images": k, "guidance_scale": scale, "prompt": "a fox in the snow, number"}
        for n, k, scale in ((10, 1, 7.5), (20, 1, 1.0), (20, 1, 7.5), (10, 4, 7.5))
    ],
}


@dataclass(frozen=True, slots=True)
class Told:
    """The promise and estimate of a request at its acceptance, and its duration from then, in seconds."""

    eta_s: float
    promise_s: float
    seconds: float


async def told(client: httpx.AsyncClient, request: Arrival, _: float) -> Told | None:
    """Request an event stream and read it to its end. None if the request is refused.

    A prompt ends with the seed, so that each one is new to the server.
    """
    fields, headers = dict(request.fields), {"Accept": "text/event-stream"}
    if "prompt" in fields:
        fields["prompt"] = f"{fields['prompt']} {fields['seed']}"
    async with client.stream("POST", "/sample", json=fields, headers=headers) as response:
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
    """Requests a second in a burst that keeps the server full."""
    began = perf_counter()
    ask(server, 48, 1e6, kinds, seed=0)
    return 48 / (perf_counter() - began)


def promises(server: Server, name: str, shares: Sequence[float] = (0.7, 0.95)) -> dict[str, list[record.Cell]]:
    with server.awake():
        most = statistics.median(capacity(server, MIXES[name]) for _ in range(3))
        rows: dict[str, list[record.Cell]] = {}
        for share in shares:
            number = max(100, round(45 * share * most))  # for 45 seconds
            outcomes = ask(server, number, share * most, MIXES[name], seed=1)
            kept = [outcome for outcome in outcomes if outcome is not None]
            on_time = sum(outcome.seconds <= outcome.promise_s for outcome in kept)
            judged = [outcome for outcome in kept if outcome.seconds > LONG_ENOUGH]
            errors = [abs(outcome.eta_s - outcome.seconds) / outcome.seconds for outcome in judged]
            error: record.Cell = [statistics.median(errors), len(errors)] if errors else "none took so long"
            rows[f"{name}, {100 * share:.0f} %"] = [number, number - len(kept), on_time / len(kept), error]
    return rows


def beside_long_ones(server: Server, fields: Fields, of_long: Fields) -> list[record.Cell]:
    """Median milliseconds of a 10-step request, alone and beside three long ones of 8 images, and their ratio."""
    with server.awake():
        solo = statistics.median(alone(server.url, 15, 10, **fields))
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            streams = []
            for seed in range(3):
                body = {"num_images": 8, "seed": seed, **of_long}
                request = client.build_request("POST", "/sample", json=body, headers={"Accept": "text/event-stream"})
                streams.append(client.send(request, stream=True).raise_for_status())  # accepted, and left unread
            beside = statistics.median(alone(server.url, 15, 10, **fields))
            for stream in streams:
                stream.close()
    return [1000 * solo, 1000 * beside, beside / solo]


def beside_the_loop(server: Server, loop: BareLoop, steps: int) -> tuple[float, float]:
    """Median seconds of a lone DDIM request, and of the same work in the bare loop, in turn."""
    served, bare = [], []
    with server.awake():
        for _ in range(ROUNDS):
            served += alone(server.url, 1, steps, sampler="ddim")
            bare.append(loop.seconds_per_row(1, steps) * steps)
    return statistics.median(served), statistics.median(bare)


def choosing(jobs: int, groups: int = 1, rounds: int = 200) -> float:
    """Median milliseconds to choose a pass among this many jobs. Promises are short, which is the worst case."""
    scheduler = crowd(jobs, groups, promised=False)
    seconds = []
    for _ in range(rounds):
        began = perf_counter()
        batch = scheduler.next_batch(0.0)
        seconds.append(perf_counter() - began)
        scheduler.advance(batch)
    return 1000 * statistics.median(seconds)


def admitting(jobs: int, groups: int = 1, rounds: int = 200) -> float:
    """Median milliseconds to admit a job behind this many, and to add it."""
    scheduler = crowd(jobs, groups, promised=True)
    line = Line(scheduler, Places(jobs + 1), Arrivals(0.0))
    seconds = []
    for _ in range(rounds):
        job = Job(Group(0, 0), [(2,) * 50] * 4, scheduler.machine, StageWork(values=(1000, 4000)))
        began = perf_counter()
        scheduler.add(job, admit(job, "one", line, 0.0, PATIENCE * 1000).promise)
        seconds.append(perf_counter() - began)
        scheduler.remove(job)
    return 1000 * statistics.median(seconds)


def crowd(jobs: int, groups: int, promised: bool) -> Scheduler:
    """This many jobs with answers. A pass of group n takes n + 1 times as long as one of group 0.

    Args:
        promised: whether promises are what admission gives, or too short.
    """
    costs, speed = {1: 0.002, 2: 0.003, 4: 0.005, 8: 0.008}, Speed()
    tables = {Group(n, n): {width: (n + 1) * seconds for width, seconds in costs.items()} for n in range(groups)}
    machine = Machine({group: Costs(table, speed) for group, table in tables.items()})
    scheduler = Scheduler(machine, dict.fromkeys(tables, 32))
    draw = random.Random(0)
    for _ in range(jobs):
        n = draw.randrange(groups)
        lines = (draw.randrange(1, 3),) * draw.randrange(10, 1000)
        job = Job(Group(n, n), [lines] * draw.randrange(1, 9), machine, StageWork(values=(1000, 4000)))
        scheduler.add(job, earliest_promise(job, scheduler, 0.0, inf) if promised else draw.random())
    return scheduler


def main() -> None:
    kept: dict[str, list[record.Cell]] = {}
    short: dict[str, list[record.Cell]] = {}
    lone: dict[str, list[record.Cell]] = {}
    with tempfile.TemporaryDirectory() as work:
        small = Path(work) / "small"
        write(small, SMALL)
        labelled: Fields = {"class_label": 3}
        for name, folder, fields in (("small", small, {}), ("digits", BOX / "digits", labelled)):
            with running(("Stepwise", "service", {"STEPWISE_WEIGHTS": str(folder)})) as [server]:
                kept |= promises(server, name)
                long: Fields = {"num_inference_steps": 1000, "sampler": "ddim", **fields}
                short[name] = beside_long_ones(server, fields, long)
                loop = openvino_loop(folder, 1)
                for steps in (10, 50):
                    served, bare = beside_the_loop(server, loop, steps)
                    over = 1000 * (served - 1.05 * bare)
                    lone[f"{name}, {steps} steps"] = [1000 * served, 1000 * bare, served / bare, over]
        convolutions = Path(work) / "convolutions"
        write(convolutions, CONVOLUTIONS)
        sizes = {"STEPWISE_WEIGHTS": str(convolutions), "STEPWISE_SIZES": SIZES}
        with running(("Stepwise", "service", sizes)) as [server]:
            kept |= promises(server, "two sizes", (0.95,))
            short["two sizes"] = beside_long_ones(server, {}, {"num_inference_steps": 30, **LARGE})
        prompts = Path(work) / "prompts"
        write_text(prompts)
        with running(("Stepwise", "service", {"STEPWISE_WEIGHTS": str(prompts)})) as [server]:
            kept |= promises(server, "prompts", (0.95,))
    lines = [(jobs, groups) for groups in (1, 3) for jobs in (250, 500, 1000, 2000, 4000)]
    choices = {f"{jobs:,} of {groups}": [choosing(jobs, groups), admitting(jobs, groups)] for jobs, groups in lines}
    tables = {
        "promises": record.Table(
            "requests, load",
            {"requests": "{}", "refused": "{}", "promises kept": "{:.1%}", "error of the estimate": "{:.0%} (of {})"},
            kept,
        ),
        "short": record.Table("", {"alone, ms": "{:.1f}", "beside them, ms": "{:.1f}", "times": "{:.2f}"}, short),
        "lone": record.Table(
            "",
            {"served, ms": "{:.1f}", "bare loop, ms": "{:.1f}", "times": "{:.2f}", "over 1.05 times, ms": "{:+.1f}"},
            lone,
        ),
        "choosing": record.Table(
            "jobs in line, groups", {"a pass, ms": "{:.2f}", "an admission, ms": "{:.2f}"}, choices
        ),
    }
    record.save("promises", machine(), ROUNDS, tables)


if __name__ == "__main__":
    main()
