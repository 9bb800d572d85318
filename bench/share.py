"""Measure the server's images a second through HTTP, relative to the bare loop's.

    python -m bench.share [--pairs 15]

The bare loop (bench/bare.py) has the same backend, precision, sampler, steps and guidance, at its best width. It has no
HTTP, no scheduler and no PNG. The server has its defaults. A load generator on the same cores sends bursts
(bench/bursts.py).

Loop and server are two processes. They are measured in turn, pair by pair, and one is idle while the other is measured.
Both are started several times, because a server that starts at a noisy moment may choose a poor width. Writes
bench/figures/share.json. Takes about six minutes on two cores.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from bench import record
from bench.bare import openvino_loop
from bench.bursts import BURSTS, Burst, weights_of
from bench.machine import machine
from bench.pairs import Pairs, quartiles
from bench.servers import running

STARTS = 3


def loop_process(folder: Path, burst: Burst, orders: Connection) -> None:
    """Run the bare loop in a process. Sends the width, then for each order the images a second of a burst."""
    loop = openvino_loop(folder)
    width = loop.best_width(at_least=burst.rows_per_step)
    orders.send(width)
    passes = -(-burst.images * burst.rows_per_image // width)
    trajectories = max(1, round(passes / burst.steps))
    rows = trajectories * burst.steps * width
    while orders.recv():
        seconds = sum(
            loop.seconds(width, burst.steps, burst.sampler, burst.guidance_scale) for _ in range(trajectories)
        )
        orders.send(rows / burst.rows_per_image / seconds)


class Loop:
    """The bare loop in its own process. The process is idle between measurements."""

    def __init__(self, orders: Connection) -> None:
        self._orders = orders
        self.width: int = orders.recv()

    def images_per_s(self) -> float:
        self._orders.send(True)
        rate: float = self._orders.recv()
        return rate


@contextmanager
def bare_loop(folder: Path, burst: Burst) -> Iterator[Loop]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=loop_process, args=(folder, burst, there))
    process.start()
    there.close()
    try:
        yield Loop(here)
        here.send(False)
        process.join()
    finally:
        process.kill()
        process.join()


def beside_the_loop(folder: Path, burst: Burst, pairs: int) -> tuple[Pairs, list[int]]:
    """Images a second of the loop and the server, and the loop's width at each start."""
    found, widths = Pairs(), []
    for start in range(STARTS):
        with (
            bare_loop(folder, burst) as loop,
            running(("Stepwise", "service", {"STEPWISE_WEIGHTS": str(folder)})) as [server],
        ):
            widths.append(loop.width)
            for pair in range(start, pairs, STARTS):
                found.measure(loop.images_per_s, partial(burst.images_per_s, server, seed=1000 * pair))
    return found, widths


def row(burst: Burst, found: Pairs, widths: list[int]) -> list[record.Cell]:
    guidance = "" if burst.rows_per_step == 1 else ", guided"
    return [
        f"{burst.images} of {burst.steps} steps{guidance}",
        ", ".join(map(str, sorted(set(widths)))),
        quartiles(found.first),
        quartiles(found.second),
        found.ratios,
        len(found.first),
    ]


COLUMNS = {
    "images of a burst": "",
    "rows of the loop's passes": "",
    "bare loop, images/s": "{:.3g} ({:.3g} to {:.3g})",
    "server, images/s": "{:.3g} ({:.3g} to {:.3g})",
    "share": "{:.0%} ({:.0%} to {:.0%})",
    "pairs": "{}",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.share", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="how often loop and server are measured; at least 3")
    pairs = parser.parse_args().pairs
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        for burst in BURSTS:
            found, widths = beside_the_loop(weights_of(burst, Path(work)), burst, pairs)
            rows[burst.name] = row(burst, found, widths)
    record.save("share", machine(), pairs, {"share": record.Table("", COLUMNS, rows)})


if __name__ == "__main__":
    main()
