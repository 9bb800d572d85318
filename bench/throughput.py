"""Measure digits a second through HTTP, as PNGs with recipes, of the four-step digits and their teacher.

    python -m bench.throughput [--rounds 5]

Closed loops: each client has one request in flight over its own connection, on the server's cores. Writes
bench/figures/throughput.json, with medians and ranges of all rounds.
"""

import argparse
import statistics

from bench import record
from bench.load import Fields, closed_loop
from bench.machine import machine
from bench.servers import Server, running

DIGITS = {"digits-4step": 2_048, "digits": 512}  # images in each case and round, by model
CLIENTS = {1: 32, 16: 4}  # by images a request


def digits_per_s(server: Server, images: int, clients: int) -> float:
    digits = DIGITS[server.name]
    requests: list[Fields] = [
        {"num_images": images, "seed": seed, "class_label": seed // images % 10} for seed in range(0, digits, images)
    ]
    with server.awake():
        return digits / closed_loop(server.url, requests, clients)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each case is measured")
    rounds = parser.parse_args().rounds
    found: dict[tuple[str, int], list[float]] = {(name, images): [] for name in DIGITS for images in CLIENTS}
    with running(*((name, "service", {"STEPWISE_WEIGHTS": name}) for name in DIGITS)) as servers:
        for _ in range(rounds):
            for server in servers:
                for images, clients in CLIENTS.items():
                    found[server.name, images].append(digits_per_s(server, images, clients))
    columns = {f"requests of {n}, {c} clients": "{:.0f} ({:.0f} to {:.0f})" for n, c in CLIENTS.items()}
    cells = {case: [statistics.median(rates), min(rates), max(rates)] for case, rates in found.items()}
    rows = {name: [cells[name, images] for images in CLIENTS] for name in DIGITS}
    record.save("throughput", machine(), rounds, {"digits": record.Table("digits a second", columns, rows)})


if __name__ == "__main__":
    main()
