"""Stepwise beside the usual servers, and beside other schedulers on the same backend, in one run.

    python -m bench.serving [--rounds 3]

Writes bench/figures/serving.json, which bench/RESULTS.md shows, and docs/throughput.png and docs/latency.png. Servers
start together, and are frozen while another one is measured. Each round goes through all of them, so that a slow moment
of the machine meets each. Takes about 25 minutes on two cores.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import matplotlib as mpl
from matplotlib import pyplot as plt

from bench import record
from bench.architectures import CIFAR10, SMALL, write
from bench.load import Load, Outcome, alone, at_once, percentile, poisson
from bench.machine import machine
from bench.peers.schedulers_server import Batches, OneAtATime
from bench.servers import ROOT, Server, Start, running
from bench.simulated import simulated
from service.build import BOX
from service.engine.scheduler import Scheduler

STEPS = (10, 20, 50)
SOLO_STEPS = 50
WIDTHS = (1, 2, 4, 8)
UTILISATIONS = (0.5, 0.7, 0.9, 1.1)  # relative to the best scheduler's capacity
SIMULATED, SIMULATED_UTILISATIONS = 5_000, (0.5, 0.7, 0.9)


@dataclass
class Figures:
    """A server's images a second in bursts, and its seconds of a lone request, an entry a round."""

    images_per_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        return statistics.median(self.images_per_s)

    @property
    def latency(self) -> float:
        return statistics.median(self.alone_s)


def side_by_side(servers: Sequence[Server], rounds: int, number: int, **fields: object) -> dict[str, Figures]:
    """Bursts of `number` requests, and lone requests, in turn."""
    found = {server.name: Figures() for server in servers}
    for round_ in range(rounds):
        for server in servers:
            with server.awake():
                found[server.name].alone_s += alone(server.url, 2, SOLO_STEPS, **fields)
                load = at_once(server.url, number, STEPS, seed=round_, **fields)
                found[server.name].images_per_s.append(load.images_per_s)
    return found


def under_load(servers: Sequence[Server], rates: Sequence[float], number: int, rounds: int) -> dict[str, list[Load]]:
    """Poisson arrivals at each rate, in turn. The result has all rounds of a server and rate together."""
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
    throughput: dict[str, dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory() as work:
        small, cifar10 = Path(work) / "small", Path(work) / "cifar10"
        write(small, SMALL)
        write(cifar10, CIFAR10)
        for name, folder, number in (("small", small, 30), ("cifar10", cifar10, 9)):
            with running(*today(folder)) as servers:
                throughput[name] = side_by_side(servers, rounds, number)
                if name == "small":
                    rate = 0.7 * throughput[name]["LitServe, batches"].throughput
                    today_under_load = under_load(servers, [rate], 48, rounds)
        with running(*beside_the_digits()) as servers:
            throughput["digits"] = side_by_side(servers, rounds, 48, class_label=3)
        with running(*schedulers(small)) as servers:
            capacity = max(f.throughput for f in side_by_side(servers, rounds, 30).values())
            schedulers_under_load = under_load(servers, [u * capacity for u in UTILISATIONS], 60, rounds)
            costs = pass_costs(servers[-1])

    tables = {name: throughput_table(found) for name, found in throughput.items()}
    tables |= latency_tables("what people run", today_under_load, ["70 %"])
    columns = [f"{100 * u:.0f} %" for u in UTILISATIONS]
    tables |= latency_tables("schedulers", schedulers_under_load, columns)
    tables |= on_a_virtual_clock(costs)
    rates = {"of the best scheduler": [capacity], "70 % of LitServe's": [rate]}
    tables["capacity"] = record.Table("capacity", {"images/s": "{:.2f}"}, rates)
    record.save("serving", machine(), rounds, tables)
    draw_throughput({name: tables[name] for name in throughput}, ROOT / "docs" / "throughput.png")
    draw_latency(schedulers_under_load, ROOT / "docs" / "latency.png")


def today(folder: Path) -> list[Start]:
    """The usual servers on torch, and Stepwise with its defaults."""
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
    """Three schedulers with the same backend and HTTP stack."""
    weights = {"STEPWISE_WEIGHTS": str(folder), "STEPWISE_MAX_QUEUE": "1000"}
    peer = "bench.peers.schedulers_server"
    return [
        ("one at a time", peer, {**weights, "SCHEDULER": "one", "STEPWISE_MAX_BATCH": "1"}),
        ("batches by request", peer, {**weights, "SCHEDULER": "batches"}),
        ("Stepwise", "service", weights),
    ]


def pass_costs(server: Server) -> dict[int, float]:
    """The server's expected seconds of a pass, by width."""
    with server.awake():
        info = httpx.get(f"{server.url}/info", trust_env=False).json()
    return {int(width): seconds for width, seconds in info["seconds_per_step"].items()}


def on_a_virtual_clock(costs: dict[int, float]) -> dict[str, record.Table]:
    """The same three schedulers on a virtual clock, with the server's costs and far more requests."""
    capacity = max(width / seconds for width, seconds in costs.items()) / statistics.mean(STEPS)
    found = {
        name: [simulated(kind, widths, u * capacity, STEPS, SIMULATED) for u in SIMULATED_UTILISATIONS]
        for name, kind, widths in (
            ("one at a time", OneAtATime, {1: costs[1]}),
            ("batches by request", Batches, costs),
            ("Stepwise", Scheduler, costs),
        )
    }
    passes = record.Table(
        "rows of a pass", {str(width): "{:.1f}" for width in WIDTHS}, {"ms": [1000 * costs[width] for width in WIDTHS]}
    )
    columns = [f"{100 * u:.0f} %" for u in SIMULATED_UTILISATIONS]
    return {"passes": passes, **latency_tables("virtual clock", found, columns)}


def throughput_table(found: Mapping[str, Figures]) -> record.Table:
    ours = found["Stepwise"]
    columns = {
        "images/s": "{:.2f}",
        "Stepwise is": "{:.2f} times",
        "alone, s": "{:.3f}",
        "Stepwise takes": "{:.2f} of it",
    }
    rows = {
        name: [of.throughput, ours.throughput / of.throughput, of.latency, ours.latency / of.latency]
        for name, of in found.items()
    }
    return record.Table("", columns, rows)


def latency_tables(title: str, found: Mapping[str, Sequence[Load]], columns: Sequence[str]) -> dict[str, record.Table]:
    """The seconds of each server at each load, and Stepwise's relative to the others'."""
    return {title: latency_table(found, columns), f"{title}, compared": comparison_table(found, columns)}


def latency_table(found: Mapping[str, Sequence[Load]], columns: Sequence[str]) -> record.Table:
    heads = ["images/s", "mean", "p50", "p95", "p99"]
    heads += [f"{steps} steps: {q}" for steps in STEPS for q in ("p50", "p95")]
    rows = {}
    for i, column in enumerate(columns):
        for name, loads in found.items():
            load = loads[i]
            every = [outcome.seconds for outcome in load.outcomes]
            cells = [load.images_per_s, statistics.mean(every), *(percentile(every, q) for q in (0.5, 0.95, 0.99))]
            for steps in STEPS:
                own = [outcome.seconds for outcome in load.outcomes if outcome.num_inference_steps == steps]
                cells += [percentile(own, 0.5), percentile(own, 0.95)]
            rows[f"{name}, {column}"] = cells
    return record.Table("server, load", dict.fromkeys(heads, "{:.2f}"), rows)


def comparison_table(found: Mapping[str, Sequence[Load]], columns: Sequence[str]) -> record.Table:
    """Stepwise's seconds relative to the others'."""

    def seconds(load: Load) -> list[float]:
        every = [outcome.seconds for outcome in load.outcomes]
        short = [outcome.seconds for outcome in load.outcomes if outcome.num_inference_steps == min(STEPS)]
        return [statistics.mean(every), percentile(every, 0.95), percentile(short, 0.95)]

    rows = {}
    for i, column in enumerate(columns):
        ours = seconds(found["Stepwise"][i])
        for name, loads in found.items():
            if name != "Stepwise":
                rows[f"{name}, {column}"] = [own / other for own, other in zip(ours, seconds(loads[i]), strict=True)]
    heads = ("mean", "p95", f"p95 of {min(STEPS)} steps")
    return record.Table("Stepwise takes, of the time of", dict.fromkeys(heads, "{:.2f}"), rows)


def draw_throughput(throughput: Mapping[str, record.Table], path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(throughput), figsize=(9, 2.6), layout="constrained")
    for axes, (checkpoint, found) in zip(all_axes, throughput.items(), strict=True):
        names = list(found.rows)[::-1]
        colours = ["tab:blue" if name == "Stepwise" else "0.7" for name in names]
        bars = axes.barh(names, [float(found.cell(name, "images/s")) for name in names], color=colours)
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
