"""Digits a second through HTTP, PNGs with their recipes: the four-step digits, and those that they were distilled from.

    python -m bench.throughput [--rounds 5]

Closed loops: so many clients, each with one request in flight over its own connection. They are as light as clients
get, for they share the cores with the server. Prints a Markdown table: medians of all rounds, and the range.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Iterator
from time import perf_counter

from bench.servers import Server, running

DIGITS = {"digits-4step": 2_048, "digits": 512}  # a case and round, by model
CLIENTS = {1: 32, 16: 4}  # by images a request
ZIP = "application/zip"


async def _client(server: Server, numbers: Iterator[int], images: int) -> None:
    """Ask for images, request after request, until none is left to ask for."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for number in numbers:  # which the clients share
        body = json.dumps({"num_images": images, "seed": number * images, "class_label": number % 10}).encode()
        accept = "image/png" if images == 1 else ZIP
        writer.write(
            f"POST /sample HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{server.name} answered {head[:40]!r}: {answer[:200]!r}")
    writer.close()


async def _closed_loop(server: Server, images: int, clients: int) -> float:
    """Digits a second."""
    numbers = iter(range(DIGITS[server.name] // images))
    began = perf_counter()
    await asyncio.gather(*(_client(server, numbers, images) for _ in range(clients)))
    return DIGITS[server.name] / (perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each case is measured")
    rounds = parser.parse_args().rounds
    found: dict[tuple[str, int], list[float]] = {}
    with running(*((name, "service", {"STEPWISE_WEIGHTS": name}) for name in DIGITS)) as servers:
        for _ in range(rounds):
            for server in servers:
                for images, clients in CLIENTS.items():
                    with server.awake():
                        rate = asyncio.run(_closed_loop(server, images, clients))
                    found.setdefault((server.name, images), []).append(rate)
    print("| digits a second | " + " | ".join(f"requests of {n}, {c} clients" for n, c in CLIENTS.items()) + " |")
    print("|---|" + "---|" * len(CLIENTS))
    for name in DIGITS:
        rates = [found[name, images] for images in CLIENTS]
        cells = [f"{statistics.median(one):.0f} ({min(one):.0f} to {max(one):.0f})" for one in rates]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
