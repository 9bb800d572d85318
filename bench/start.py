"""Measure the time from the server's start to its first ready answer, with a warm cache.

    python -m bench.start [--rounds 9]

Starts the server with each of the weights in the box, in turn. The first start of each converts the network, and
does not count. Writes bench/figures/start.json. Takes about a minute on two cores.
"""

import argparse
import statistics
import tempfile
import time

from bench import record
from bench.machine import machine
from bench.servers import Server

WEIGHTS = ("digits", "digits-4step", "emoji")
LOOK_EVERY = 0.01  # seconds


def seconds_to_ready(weights: str, cache: str) -> float:
    began = time.perf_counter()
    server = Server(weights, ["-m", "service"], {"STEPWISE_WEIGHTS": weights, "STEPWISE_CACHE_DIR": cache})
    try:
        server.wait("/health/ready", LOOK_EVERY)
        return time.perf_counter() - began
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="starts of each that are counted")
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {weights: [] for weights in WEIGHTS}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(1 + rounds):
            for weights, seconds in found.items():
                seconds.append(seconds_to_ready(weights, cache))
    rows = {
        weights: [[statistics.median(counted), min(counted), max(counted)]] for weights, (_, *counted) in found.items()
    }
    table = record.Table("", {"start to ready, s": "{:.1f} ({:.1f} to {:.1f})"}, rows)
    record.save("start", machine(), rounds, {"start": table})


if __name__ == "__main__":
    main()
