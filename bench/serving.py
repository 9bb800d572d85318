"""Stepwise beside what people use now, and beside other schedulers on the same backend; in one run.

    python -m bench.serving [--rounds 3]

Writes bench/RESULTS.md, docs/throughput.png and docs/latency.png. Servers are started together and frozen while
another is measured; rounds go through all of them, so that a slow moment of the machine meets each. It takes about
25 minutes on two cores.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from bench.architectures import CIFAR10, SMALL, write
from bench.bare import BareLoop, openvino_loop
from bench.load import Load, Outcome, alone, at_once, percentile, poisson
from bench.peers.schedulers_server import Batches, OneAtATime
from bench.servers import ROOT, Server, Start, running
from bench.simulated import simulated
from service.build import BOX
from service.config import available_cores
from service.engine.scheduler import Scheduler

STEPS = (10, 20, 50)
SOLO_STEPS = 50
WIDTHS = (1, 2, 4, 8)
UTILISATIONS = (0.5, 0.7, 0.9, 1.1)  # of the best scheduler's capacity
SIMULATED, SIMULATED_UTILISATIONS = 5_000, (0.5, 0.7, 0.9)
COLOURS = {"Stepwise": "tab:blue", "bare loop": "0.85"}


@dataclass
class Figures:
    """Of one server or loop: images a second in bursts, and seconds of a lone request, a list entry a round."""

    images_per_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        return statistics.median(self.images_per_s)

    @property
    def latency(self) -> float:
        return statistics.median(self.alone_s)


def side_by_side(
    servers: Sequence[Server], bare: BareLoop | None, rounds: int, number: int, **fields: object
) -> dict[str, Figures]:
    """Bursts of `number` requests and lone ones, in turn."""
    found = {server.name: Figures() for server in servers}
    if bare is not None:
        found["bare loop"] = Figures()
    for round_ in range(rounds):
        for server in servers:
            with server.awake():
                found[server.name].alone_s += alone(server.url, 2, SOLO_STEPS, **fields)
                load = at_once(server.url, number, STEPS, seed=round_, **fields)
                found[server.name].images_per_s.append(load.images_per_s)
        if bare is not None:
            found["bare loop"].images_per_s.append(1 / bare.best() / statistics.mean(STEPS))
            found["bare loop"].alone_s.append(bare.seconds_per_row(1, SOLO_STEPS) * SOLO_STEPS)
    return found


def under_load(servers: Sequence[Server], rates: Sequence[float], number: int, rounds: int) -> dict[str, list[Load]]:
    """Poisson arrivals at each rate, in turn: for each server and rate, the rounds' outcomes together."""
    found: dict[str, list[Load]] = {server.name: [] for server in servers}
    for rate in rates:
        outcomes: dict[str, list[Outcome]] = {server.name: [] for server in servers}
        seconds = dict.fromkeys(outcomes, 0.0)
        for round_ in range(rounds):
            for server in servers:
                with server.awake():
                    load = poisson(server.url, number, rate, STEPS, seed=round_)
                outcomes[server.name] += load.outcomes
                seconds[server.name] += load.seconds
        for name, all_rounds in outcomes.items():
            found[name].append(Load(all_rounds, seconds[name]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that each server is measured")
    rounds = parser.parse_args().rounds
    report = [f"# Results\n\n`make bench`, {datetime.now(UTC):%Y-%m-%d}. {machine()}\n"]
    throughput: dict[str, dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory() as work:
        small, cifar10 = Path(work) / "small", Path(work) / "cifar10"
        write(small, SMALL)
        write(cifar10, CIFAR10)
        for name, folder, number in (("small", small, 30), ("cifar10", cifar10, 9)):
            with running(*today(folder)) as servers:
                throughput[name] = side_by_side(servers, openvino_loop(folder, *WIDTHS), rounds, number)
                if name == "small":
                    rate = 0.7 * throughput[name]["LitServe, batches"].throughput
                    today_under_load = under_load(servers, [rate], 48, rounds)
        with running(*beside_the_digits()) as servers:
            throughput["digits"] = side_by_side(servers, None, rounds, 48, class_label=3)
        with running(*schedulers(small)) as servers:
            capacity = max(f.throughput for f in side_by_side(servers, None, rounds, 30).values())
            schedulers_under_load = under_load(servers, [u * capacity for u in UTILISATIONS], 60, rounds)
            costs = pass_costs(servers[-1])

    for name, found in throughput.items():
        report.append(throughput_table(name, found))
    report.append(
        f"## What people run today, under load\n\n`small`, Poisson arrivals, steps evenly of {words(STEPS)}, "
        "seconds from arrival to answer. The load is 70 % of LitServe's capacity.\n\n"
        + latency_table(today_under_load, [f"{rate:.2f}/s"])
        + "\n"
        + comparison_table(today_under_load, [f"{rate:.2f}/s"])
    )
    report.append(
        f"## One backend, three schedulers\n\n`small` on OpenVINO, at shares of the best one's capacity, "
        f"{capacity:.2f} images/s.\n\n"
        + latency_table(schedulers_under_load, [f"{u:.0%}" for u in UTILISATIONS])
        + "\n"
        + comparison_table(schedulers_under_load, [f"{u:.0%}" for u in UTILISATIONS])
    )
    report.append(on_a_virtual_clock(costs))
    (ROOT / "bench" / "RESULTS.md").write_text("\n".join(report))
    draw_throughput(throughput, ROOT / "docs" / "throughput.png")
    draw_latency(schedulers_under_load, ROOT / "docs" / "latency.png")
    print("\n".join(report))


def today(folder: Path) -> list[Start]:
    """What people run today, on torch, and Stepwise with its defaults."""
    checkpoint = {"CHECKPOINT": str(folder)}
    return [
        ("diffusers, one at a time", "bench.peers.diffusers_server", checkpoint),
        ("LitServe, batches", "bench.peers.litserve_server", checkpoint),
        ("Stepwise", "service", {"STEPWISE_WEIGHTS": str(folder)}),
    ]


def beside_the_digits() -> list[Start]:
    return [
        ("plain loop", "bench.peers.digits_server", {}),
        ("Stepwise", "service", {"STEPWISE_WEIGHTS": str(BOX / "digits")}),
    ]


def schedulers(folder: Path) -> list[Start]:
    """One backend, one HTTP stack, three schedulers."""
    weights = {"STEPWISE_WEIGHTS": str(folder), "STEPWISE_MAX_QUEUE": "1000"}
    peer = "bench.peers.schedulers_server"
    return [
        ("one at a time", peer, {**weights, "SCHEDULER": "one", "STEPWISE_MAX_BATCH": "1"}),
        ("batches by request", peer, {**weights, "SCHEDULER": "batches"}),
        ("Stepwise", "service", weights),
    ]


def pass_costs(server: Server) -> dict[int, float]:
    """Seconds of a pass by its width, as the server expects them."""
    with server.awake():
        info = httpx.get(f"{server.url}/info", trust_env=False).json()
    return {int(width): seconds for width, seconds in info["seconds_per_step"].items()}


def on_a_virtual_clock(costs: dict[int, float]) -> str:
    """The same three schedulers with the costs of the server, and far more requests than there is time for."""
    capacity = max(width / seconds for width, seconds in costs.items()) / statistics.mean(STEPS)
    found = {
        name: [simulated(kind, widths, u * capacity, STEPS, SIMULATED) for u in SIMULATED_UTILISATIONS]
        for name, kind, widths in (
            ("one at a time", OneAtATime, {1: costs[1]}),
            ("batches by request", Batches, costs),
            ("Stepwise", Scheduler, costs),
        )
    }
    columns = [f"{u:.0%}" for u in SIMULATED_UTILISATIONS]
    return (
        f"## The same on a virtual clock\n\n{SIMULATED:,} requests at each load; passes take exactly what the server "
        f"measured: {', '.join(f'{1000 * costs[width]:.1f} ms for {width}' for width in WIDTHS)}. No HTTP, no noise. "
        "One at a time cannot do all that is asked where width pays.\n\n"
        + latency_table(found, columns)
        + "\n"
        + comparison_table(found, columns)
    )


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return (
        f"{available_cores()} cores of {names[0] if names else platform.processor()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, which computes a 3x3 convolution of 256 channels at "
        f"{peak(torch.float32):.0f} GFLOP/s in float32 and {peak(torch.bfloat16):.0f} in bfloat16. The machine "
        "is shared: figures compare within a run, not between runs. Medians over rounds."
    )


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a large convolution."""
    x, weight = torch.randn(8, 256, 64, 64, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.conv2d(x, weight, padding=1)
            seconds.append(time.perf_counter() - began)
    return 2 * x.numel() * weight[:, 0].numel() / min(seconds) / 1e9


def throughput_table(checkpoint: str, found: Mapping[str, Figures]) -> str:
    ours = found["Stepwise"]
    lines = [
        f"## {checkpoint}\n",
        f"Bursts, steps evenly of {words(STEPS)}; and lone requests of {SOLO_STEPS} steps.\n",
        "| | images/s | Stepwise is | alone, s | Stepwise takes |",
        "|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        lines.append(
            f"| {name} | {figures.throughput:.2f} | {ours.throughput / figures.throughput:.2f} times | "
            f"{figures.latency:.3f} | {ours.latency / figures.latency:.2f} of it |"
        )
    return "\n".join([*lines, ""])


def latency_table(found: Mapping[str, Sequence[Load]], columns: Sequence[str]) -> str:
    lines = [
        "| | load | images/s | mean | p50 | p95 | p99 | "
        + " | ".join(f"{steps} steps: p50, p95" for steps in STEPS)
        + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(STEPS),
    ]
    for i, column in enumerate(columns):
        for name, loads in found.items():
            load = loads[i]
            every = [outcome.seconds for outcome in load.outcomes]
            cells = [f"{load.images_per_s:.2f}", f"{statistics.mean(every):.2f}"]
            cells += [f"{percentile(every, q):.2f}" for q in (0.5, 0.95, 0.99)]
            for steps in STEPS:
                own = [outcome.seconds for outcome in load.outcomes if outcome.num_inference_steps == steps]
                cells.append(f"{percentile(own, 0.5):.2f}, {percentile(own, 0.95):.2f}")
            lines.append(f"| {name} | {column} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def comparison_table(found: Mapping[str, Sequence[Load]], columns: Sequence[str]) -> str:
    """Stepwise's seconds in parts of the others'."""
    lines = [
        "| Stepwise takes, of the time of | load | mean | p95 | p95 of 10 steps |",
        "|---|---|---|---|---|",
    ]

    def seconds(load: Load) -> list[float]:
        every = [outcome.seconds for outcome in load.outcomes]
        short = [outcome.seconds for outcome in load.outcomes if outcome.num_inference_steps == min(STEPS)]
        return [statistics.mean(every), percentile(every, 0.95), percentile(short, 0.95)]

    for i, column in enumerate(columns):
        ours = seconds(found["Stepwise"][i])
        for name, loads in found.items():
            if name != "Stepwise":
                parts = [f"{own / other:.2f}" for own, other in zip(ours, seconds(loads[i]), strict=True)]
                lines.append(f"| {name} | {column} | {' | '.join(parts)} |")
    return "\n".join([*lines, ""])


def words(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}"


def draw_throughput(throughput: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(throughput), figsize=(9, 2.6), layout="constrained")
    for axes, (checkpoint, found) in zip(all_axes, throughput.items(), strict=True):
        names = list(found)[::-1]
        colours = [COLOURS.get(name, "0.7") for name in names]
        bars = axes.barh(names, [found[name].throughput for name in names], color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=2)
        axes.set_title(checkpoint, loc="left")
        axes.set_xlabel("images/s")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_latency(found: Mapping[str, Sequence[Load]], path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(STEPS), figsize=(9, 3.2), layout="constrained", sharey=True)
    for axes, steps in zip(all_axes, STEPS, strict=True):
        for name, loads in found.items():
            own = [[o.seconds for o in load.outcomes if o.num_inference_steps == steps] for load in loads]
            x = [100 * u for u in UTILISATIONS]
            [line] = axes.plot(x, [percentile(seconds, 0.5) for seconds in own], marker="o", label=name)
            axes.plot(x, [percentile(seconds, 0.95) for seconds in own], ls=":", marker=".", color=line.get_color())
        axes.set_title(f"{steps} steps", loc="left")
        axes.set_xlabel("% of the capacity")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("seconds, p50 and p95 (dotted)")
    all_axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    mpl.use("Agg")
    main()
