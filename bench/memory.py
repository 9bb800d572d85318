"""Measure whether memory stays flat: the server's resident memory while it draws many digits.

    python -m bench.memory [--digits 100000]

Requests have 64 images as a sheet, a ZIP or JSON in turn, or a single image, with one or two steps each. Writes
bench/figures/memory.json.
"""

import argparse
import itertools
from pathlib import Path

import httpx

from bench import record
from bench.load import PATIENCE
from bench.machine import machine
from bench.servers import Server, running
from service.build import BOX

LOOKS = 10
MEDIA = ("image/png", "application/zip", "application/json")


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB, without mapped files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def draw(client: httpx.Client, digits: int, seeds: "itertools.count[int]") -> None:
    """Draw at least this many digits."""
    drawn = 0
    for media_type in itertools.cycle(MEDIA):
        seed = next(seeds)
        for num_images in (64, 1):
            body = {"seed": 100 * seed, "num_images": num_images, "num_inference_steps": 1 + seed % 2, "class_label": 3}
            accept = {"Accept": media_type}
            client.post("/sample", json=body, headers=accept).raise_for_status()
            drawn += num_images
        if drawn >= digits:
            return


def look(server: Server, digits: int) -> dict[str, list[record.Cell]]:
    """Resident memory before the first digit, and after each tenth of them."""
    seeds = itertools.count()
    held: dict[str, list[record.Cell]] = {"0": [resident_mb(server.pid)]}
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client, server.awake():
        for part in range(1, LOOKS + 1):
            draw(client, digits // LOOKS, seeds)
            held[f"{part * digits // LOOKS:,}"] = [resident_mb(server.pid)]
    return held


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--digits", type=int, default=100_000, help="how many to draw")
    digits = parser.parse_args().digits
    with running(("Stepwise", "service", {"STEPWISE_WEIGHTS": str(BOX / "digits")})) as [server]:
        rows = look(server, digits)
    table = record.Table("digits drawn", {"resident, MB": "{:.1f}"}, rows)
    record.save("memory", machine(), 1, {"memory": table})


if __name__ == "__main__":
    main()
