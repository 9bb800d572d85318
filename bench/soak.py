"""Clients that come and leave, for minutes: nothing of them may stay.

    python -m bench.soak [--clients 2000] [--minutes 5]

They ask the digits' server for images or streams, and read all of it, leave midway, leave while they wait, or never
read what they asked for. Prints what the server holds each time that a fifth of them is gone.
"""

import argparse
import asyncio
import contextlib
import random
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.load import PATIENCE
from bench.memory import resident_mb
from bench.servers import Server, running
from service.__main__ import BOX

PARTS = 5
GAUGES = ("stepwise_rows_running", "stepwise_rows_waiting", "stepwise_outstanding_row_steps")


async def visit(url: str, draw: random.Random) -> None:
    """One client: all of an answer, or a part of it."""
    stays = draw.choice(("reads", "reads", "leaves", "leaves at once", "never reads"))
    fields = {
        "num_inference_steps": draw.choice((1, 5, 15, 50, 100)),
        "num_images": draw.choice((1, 1, 2, 8)),
        "class_label": draw.randrange(10),
        "preview_every": draw.choice((0, 1)),
    }
    media_type = draw.choice(("image/png", "application/json", "text/event-stream"))
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        headers = {"Accept": media_type}
        asking = client.stream("POST", "/sample", json=fields, headers=headers)
        patience = {"reads": PATIENCE, "leaves": 0.3, "leaves at once": 0.01, "never reads": 0.3}[stays]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience), asking as response:
                if stays == "never reads":
                    await asyncio.sleep(patience)
                async for _ in response.aiter_raw():
                    pass


async def come_and_go(url: str, clients: int, seconds: float, seed: int) -> None:
    draw = random.Random(seed)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(visit(url, random.Random(draw.random())))
            await asyncio.sleep(draw.expovariate(clients / seconds))


def holds(server: Server) -> dict[str, float]:
    """What the server holds once it is idle."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        for _ in range(600):
            text = client.get("/metrics").text
            samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
            if not any(samples[name] for name in GAUGES):
                break
            time.sleep(0.1)
    found = {name.removeprefix("stepwise_"): samples[name] for name in GAUGES}
    found["descriptors"] = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
    found["threads"] = len(list(Path(f"/proc/{server.pid}/task").iterdir()))
    found["resident, MB"] = resident_mb(server.pid)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=2000, help="how many come and leave")
    parser.add_argument("--minutes", type=float, default=5.0, help="in how long")
    arguments = parser.parse_args()
    part, seconds = arguments.clients // PARTS, 60 * arguments.minutes / PARTS
    settings = {"STEPWISE_WEIGHTS": str(BOX / "digits")}
    found = []
    with running(("Stepwise", "service", settings)) as [server], server.awake():
        for seed in range(PARTS):
            asyncio.run(come_and_go(server.url, part, seconds, seed))
            found.append(holds(server))
    print(f"| clients so far | {' | '.join(f'{part * (i + 1):,}' for i in range(PARTS))} |\n|---|{'---|' * PARTS}")
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{held[name]:g}' for held in found)} |")


if __name__ == "__main__":
    main()
