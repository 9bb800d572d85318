"""Run minutes of good and bad client behaviour. Nothing may be lost, and nothing may grow.

    python -m bench.soak [--minutes 10] [--slow]

Clients ask the digits' server for images or streams. They read the whole answer, leave midway, leave while they wait,
or never read. Others send half a request, or nonsense. At times a burst fills the queue. Prints all outcomes, and the
server's resources after each fifth of the time. Fails if an answer breaks the contract; if the server was not ready; if
an accepted request did not end, or a promise was not counted; or if memory, threads or descriptors grow. With --slow
the network has random weights and runs on one core. Its passes take a hundred times as long as those of the digits.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.load import PATIENCE
from bench.memory import resident_mb
from bench.servers import Server, running
from model.checkpoints import native
from service.build import BOX

PARTS = 5
CLIENTS_A_MINUTE = 400
BURST, BURSTS_A_PART = 150, 4  # requests; more than places
SETTINGS = {"STEPWISE_MAX_QUEUE": "64", "STEPWISE_MAX_BODY": "1MiB"}
GAUGES = ("rows_running", "rows_waiting", "outstanding_row_steps")
MAY_GROW_MB = 8.0  # growth from the second fifth, by when all kinds of requests have come, to the last
MAY_GROW = 3  # threads or descriptors, of pools and idle connections

JSON = "application/json"
SENSELESS = (  # method, path, content type, body, status
    ("POST", "/sample", JSON, b'{"num_images": 0}', 422),
    ("POST", "/sample", JSON, b'{"class_label": "eleven"}', 422),
    ("POST", "/sample", JSON, b"{" * 5000, 422),
    ("POST", "/sample", JSON, b" " * (2**20 + 1), 413),
    ("POST", "/sample", "text/plain", b"a seven, please", 415),
    ("POST", "/denoise", JSON, json.dumps({"timestep": 5, "image": "no"}).encode(), 422),
    (
        "POST",
        "/denoise",
        JSON,
        json.dumps({"timestep": 5, "image": base64.b64encode(bytes(9999)).decode()}).encode(),
        422,
    ),
    ("POST", "/noise", "multipart/form-data; boundary=B", b"--B\r\n\r\n" * 99, 422),
    ("GET", "/sample?seed=-1", "", b"", 422),
    ("GET", "/nowhere", "", b"", 404),
    ("DELETE", "/sample", "", b"", 405),
)
HALVES = (b"", b"GET", b"\x16\x03\x01\0", b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")


class Wishes(NamedTuple):
    """Fields of the clients' requests."""

    steps: tuple[int, ...]
    steps_in_a_burst: tuple[int, ...]
    num_images: tuple[int, ...]


WISHES = Wishes((1, 5, 15, 50, 100), (1, 10), (1, 1, 2, 8))
WISHES_OF_SLOW = Wishes((1, 1, 2), (1, 2), (1, 1, 2))
SETTINGS_OF_SLOW = {"STEPWISE_THREADS": "1", "STEPWISE_TIMEOUT": "120"}
SLOW = {  # about a second a pass on one core
    "architecture": "diffusion_unet",
    "in_channels": 1,
    "image_size": [512, 512],
    "model_channels": 64,
    "channel_multipliers": [1, 2],
    "norm_groups": 4,
    "num_classes": 10,
    "schedule": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "recommended": {"num_inference_steps": 2},
}


def write_slow(folder: Path) -> None:
    """Write random weights."""
    config = native.parse(folder, SLOW)
    native.save(config.build(), None, config, folder)


class Outcomes(Counter[str]):
    """The number of clients by outcome, and descriptions of failures."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []

    def check(self, right: bool, what: object) -> None:
        if not right:
            self.wrong.append(str(what)[:300])


async def visit(url: str, wishes: Wishes, draw: random.Random, outcomes: Outcomes) -> None:
    """Run one client, which reads all or a part of an answer."""
    stays = draw.choice(("reads", "reads", "leaves", "leaves at once", "never reads"))
    fields = {
        "num_inference_steps": draw.choice(wishes.steps),
        "num_images": draw.choice(wishes.num_images),
        "class_label": draw.randrange(10),
    }
    media_type = draw.choice(("image/png", JSON, "text/event-stream"))
    if media_type == "text/event-stream":
        fields["preview_every"] = draw.choice((0, 1))
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        asking = client.stream("POST", "/sample", json=fields, headers={"Accept": media_type})
        patience = {"reads": PATIENCE, "leaves": 0.3, "leaves at once": 0.01, "never reads": 0.3}[stays]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience), asking as response:
                if stays == "never reads":
                    await asyncio.sleep(patience)
                body = b"".join([part async for part in response.aiter_raw()])
                outcomes["answered" if response.status_code == 200 else f"refused with {response.status_code}"] += 1
                outcomes.check(is_answer(response, body), (response.status_code, body))
                return
    outcomes[stays.replace("leaves", "left").replace("reads", "read")] += 1


def is_answer(response: httpx.Response, body: bytes) -> bool:
    """Whether an answer is whole images, or a refusal with Retry-After."""
    if response.status_code in (429, 503):
        return int(response.headers["retry-after"]) > 0 and json.loads(body)["status"] == response.status_code
    media_type = response.headers["content-type"].partition(";")[0]
    ends = {"image/png": b"IEND\xaeB`\x82", JSON: b"}", "text/event-stream": b"\n\n"}[media_type]
    if media_type == "text/event-stream":
        return b"event: done\n" in body and body.endswith(ends)
    return response.status_code == 200 and body.endswith(ends)


async def talk_nonsense(url: str, wishes: Wishes, draw: random.Random, outcomes: Outcomes) -> None:
    """Run one client, which sends an invalid request or half of one, and leaves."""
    if draw.random() < 0.3:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(draw.choice(HALVES))
        await writer.drain()
        await asyncio.sleep(draw.random())
        writer.close()
        outcomes["no request, or half of one"] += 1
        return
    method, path, media_type, body, status = draw.choice(SENSELESS)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        response = await client.request(method, path, content=body, headers={"Content-Type": media_type})
        outcomes[f"senseless: {status}"] += 1
        outcomes.check(response.status_code == status and response.json()["status"] == status, (path, response.text))


async def burst(url: str, wishes: Wishes, draw: random.Random, outcomes: Outcomes) -> None:
    """Send more requests at once than there are places."""
    limits = httpx.Limits(max_connections=BURST)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False, limits=limits) as client:
        asked = [
            {"seed": draw.randrange(2**31), "num_inference_steps": draw.choice(wishes.steps_in_a_burst)}
            for _ in range(BURST)
        ]
        for response in await asyncio.gather(*(client.post("/sample", json=fields) for fields in asked)):
            outcomes[f"in a burst: {response.status_code}"] += 1
            outcomes.check(is_answer(response, response.content), (response.status_code, response.text))


async def ask_health(url: str, seconds: float, outcomes: Outcomes) -> None:
    """Check health as a balancer does: twice a second, with a timeout of a second."""
    async with httpx.AsyncClient(base_url=url, timeout=1.0, trust_env=False) as client:
        for _ in range(int(2 * seconds)):
            for path in ("/health/live", "/health/ready"):
                try:
                    ready = (await client.get(path)).status_code == 200
                except httpx.TransportError:
                    ready = False
                outcomes["ready" if ready else "not ready"] += 1
            await asyncio.sleep(0.5)


async def come_and_go(url: str, wishes: Wishes, seconds: float, seed: int, outcomes: Outcomes) -> None:
    """Run clients for a part of the time."""
    draw = random.Random(seed)
    loop = asyncio.get_running_loop()
    end, next_burst = loop.time() + seconds, loop.time()
    async with asyncio.TaskGroup() as group:
        group.create_task(ask_health(url, seconds, outcomes))
        while loop.time() < end:
            what = draw.choice((visit, visit, visit, talk_nonsense))
            if loop.time() >= next_burst:
                what, next_burst = burst, next_burst + seconds / BURSTS_A_PART
            group.create_task(what(url, wishes, random.Random(draw.random()), outcomes))
            await asyncio.sleep(draw.expovariate(CLIENTS_A_MINUTE / 60))


def holds(server: Server, outcomes: Outcomes) -> dict[str, float]:
    """Wait until the server is idle, check its counts, and return its resources."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        for _ in range(4000):
            samples = [
                one for family in text_string_to_metric_families(client.get("/metrics").text) for one in family.samples
            ]
            totals = {
                " ".join([one.name.removeprefix("stepwise_"), *one.labels.values()]): one.value for one in samples
            }
            idle = not any(totals[name] for name in GAUGES)
            ended = sum(totals[f"promises_total {outcome}"] for outcome in ("kept", "missed"))
            ended += sum(totals[f"cancelled_total {reason}"] for reason in ("disconnect", "failed", "draining"))
            if idle and totals["accepted_total"] == ended:
                break
            time.sleep(0.1)
    outcomes.check(idle, {name: totals[name] for name in GAUGES})
    outcomes.check(totals["accepted_total"] == ended, f"accepted {totals['accepted_total']}, ended {ended}")
    return {
        "accepted": totals["accepted_total"],
        "promises kept": totals["promises_total kept"],
        "promises missed": totals["promises_total missed"],
        "left before their end": totals["cancelled_total disconnect"],
        "failed": totals["cancelled_total failed"],
        "rows running, waiting, still to run": sum(totals[name] for name in GAUGES),
        "descriptors": len(list(Path(f"/proc/{server.pid}/fd").iterdir())),
        "threads": len(list(Path(f"/proc/{server.pid}/task").iterdir())),
        "resident, MB": resident_mb(server.pid),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--slow", action="store_true", help="a network of which one pass takes seconds")
    arguments = parser.parse_args()
    minutes: float = arguments.minutes
    wishes = WISHES_OF_SLOW if arguments.slow else WISHES
    outcomes, found = Outcomes(), []
    with tempfile.TemporaryDirectory() as folder:
        weights = BOX / "digits"
        if arguments.slow:
            weights = Path(folder) / "slow"
            write_slow(weights)
        settings = {**SETTINGS, **(SETTINGS_OF_SLOW if arguments.slow else {}), "STEPWISE_WEIGHTS": str(weights)}
        with running(("Stepwise", "service", settings)) as [server], server.awake():
            for seed in range(PARTS):
                asyncio.run(come_and_go(server.url, wishes, 60 * minutes / PARTS, seed, outcomes))
                found.append(holds(server, outcomes))
    outcomes.check(outcomes["not ready"] <= outcomes["ready"] / 1000, "the server was not ready")
    print("| what became of clients | |\n|---|---|")
    for outcome, count in sorted(outcomes.items()):
        print(f"| {outcome} | {count:,} |")
    print(
        f"\n| minutes | {' | '.join(f'{minutes / PARTS * (i + 1):g}' for i in range(PARTS))} |\n|---|{'---|' * PARTS}"
    )
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{held[name]:g}' for held in found)} |")

    first, second, *_, last = found
    outcomes.check(last["resident, MB"] <= second["resident, MB"] + MAY_GROW_MB, "memory grows")
    for name in ("threads", "descriptors"):
        outcomes.check(last[name] <= first[name] + MAY_GROW, f"{name} grow")
    if outcomes.wrong:
        sys.exit("\n".join(["", "not as it should be:", *outcomes.wrong[:20]]))


if __name__ == "__main__":
    main()
