"""How cost grows with the images of a request, its steps, the image's size, and the rows of a pass.

    python -m bench.cost [--rounds 5]

Writes bench/figures/cost.json and draws docs/cost.png. Rounds go through all cases; figures are medians. Takes about
six minutes on two cores.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench import record
from bench.architectures import CIFAR10, SMALL, write
from bench.bare import openvino_loop, torch_loop
from bench.load import alone
from bench.machine import machine
from bench.servers import ROOT, Server, running
from service.build import BOX

IMAGES = (1, 2, 4, 8, 16, 32, 64)
STEPS = (1, 2, 5, 10, 20, 50, 100)
SIZES = (16, 32, 64, 128)  # pixels a side
WIDTHS = (1, 2, 4, 8, 16)

Case = TypeVar("Case", bound=Hashable)
Curve = dict[int, float]  # milliseconds


def medians(cases: Mapping[Case, Callable[[], float]], rounds: int) -> dict[Case, float]:
    """Median milliseconds of each case. Cases return seconds, and are measured in turn."""
    found: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, measure in cases.items():
            found[case].append(measure())
    return {case: 1000 * statistics.median(seconds) for case, seconds in found.items()}


def seconds_of_request(server: Server, num_images: int, steps: int) -> float:
    [seconds] = alone(server.url, 1, steps, num_images=num_images, class_label=3)
    return seconds


def table(head: str, curves: Mapping[str, Curve]) -> record.Table:
    columns = {str(x): "{:g}" for x in next(iter(curves.values()))}
    rows = {name: [float(f"{ms:.3g}") for ms in curve.values()] for name, curve in curves.items()}  # three digits
    return record.Table(head, columns, rows)


def draw(axes: Axes, title: str, head: str, curves: Mapping[str, Curve]) -> None:
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", ms=4, label=name)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(head)
    axes.set_ylabel("ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(y=0.3 if len(curves) > 1 else 0.05)  # room for the legend
    axes.set_xticks(list(next(iter(curves.values()))), labels=map(str, next(iter(curves.values()))))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each case is measured")
    rounds = parser.parse_args().rounds
    digits = BOX / "digits"
    with running(("digits", "service", {"STEPWISE_WEIGHTS": str(digits)})) as [server], server.awake():
        images = medians({n: partial(seconds_of_request, server, n, 15) for n in IMAGES}, rounds)
        steps = medians({n: partial(seconds_of_request, server, 1, n) for n in STEPS}, rounds)

    with tempfile.TemporaryDirectory() as work:
        small, cifar10 = Path(work) / "small", Path(work) / "cifar10"
        write(small, SMALL)
        write(cifar10, CIFAR10)
        sized = {size: Path(work) / str(size) for size in SIZES}
        for size, folder in sized.items():
            write(folder, {**SMALL, "sample_size": size})
        loops = {size: openvino_loop(folder, 1) for size, folder in sized.items()}
        sizes = medians({size: partial(loop.seconds_per_row, 1) for size, loop in loops.items()}, rounds)

        wide = {}
        for name, folder in {"digits": digits, "small": small, "cifar10": cifar10}.items():
            loop = openvino_loop(folder, *WIDTHS)
            wide[name] = medians({width: partial(loop.seconds_per_row, width) for width in WIDTHS}, rounds)
        on_torch = {width: torch_loop(digits, width) for width in WIDTHS}
        wide["digits on torch, float32"] = medians(
            {width: partial(loop.seconds_per_row, width) for width, loop in on_torch.items()}, rounds
        )

    panels: dict[str, tuple[str, str, dict[str, Curve]]] = {
        "images": ("A request's time by its images (15 steps, guided)", "images", {"digits": images}),
        "steps": ("A request's time by its steps (one image, guided)", "steps", {"digits": steps}),
        "sizes": ("A row's step by the image's side", "pixels", {"the network of `small`": sizes}),
        "widths": ("A row's step by the rows of a pass", "rows", wide),
    }
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for one, panel in zip(axes.flat, panels.values(), strict=True):
        draw(one, *panel)
    figure.savefig(ROOT / "docs" / "cost.png", dpi=120)
    record.save("cost", machine(), rounds, {name: table(head, curves) for name, (_, head, curves) in panels.items()})


if __name__ == "__main__":
    mpl.use("Agg")
    main()
