"""The cost of each layer around the network, at saturation.

    python -m bench.layers [--rounds 5]

Measures milliseconds of a row's step for the networks `small` and of the digits: through the network alone; with the
update; through the runner's slots; through the engine and its scheduler; through HTTP, with PNGs and the load
generator. Each contains the one before. All run at the server's default width, in turn; figures are medians. Then the
same without a network, where the machine's noise hides nothing. Writes bench/figures/layers.json.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from bench import record
from bench.architectures import SMALL, write
from bench.bare import BareLoop, random_inputs
from bench.cost import medians
from bench.load import at_once
from bench.machine import machine
from bench.servers import Server, running
from model.backends.backend import Backend, Inputs
from model.backends.choose import choose
from model.backends.network import Network, denoiser
from model.checkpoints.load import load
from model.conditions import Conditions
from model.description import ModelDescription
from model.rows import Condition, Forward, Row
from model.runner import SlotRunner
from model.samplers import sample_table
from service.build import BOX, probe_row
from service.config import available_cores
from service.engine.engine import Engine
from service.engine.fairness import Places
from service.engine.requests import Finished
from service.http.metrics import Metrics

STEPS = 20
JOBS = 64


class NoNetwork:
    """Predicts nothing, in no time. Implements model.backends.backend.Backend."""

    device = torch.device("cpu")
    fingerprint: dict[str, str | int] = {}  # noqa: RUF012
    reproducible = True

    def __init__(self, model: ModelDescription, width: int) -> None:
        self.widths = range(1, width + 1)
        self._out = torch.zeros(width, model.out_channels, *model.sample_shape[1:])

    def prepare(self) -> None:
        """Nothing is to be compiled."""

    def send(self, values: Tensor) -> Tensor:
        return values

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: self._out[: len(inputs["x"])]


class Stack(NamedTuple):
    """A backend, what it runs, and what its rows are given beside x."""

    backend: Backend
    network: Network
    model: ModelDescription
    conditions: Conditions

    def runner(self) -> SlotRunner:
        return SlotRunner(self.backend, self.model.sample_shape, self.conditions, slots=self.backend.widths[-1])


def stack_of(folder: Path, backend: Backend | None = None) -> Stack:
    """Loaded weights on a backend; None is the server's."""
    checkpoint = load(folder)
    model, network = checkpoint.description, denoiser(checkpoint.network, checkpoint.description)
    if backend is None:
        make = choose(network, torch.device("cpu"), "auto", available_cores(), None, cache_dir=None)
        backend = make(model.sample_shape)
    return Stack(backend, network, model, Conditions(checkpoint.network.embedder, backend, model.no_label))


def through_network(stack: Stack) -> float:
    width = stack.backend.widths[-1]
    inputs = random_inputs(stack.network, width)
    began = perf_counter()
    for _ in range(STEPS):
        stack.backend.start(inputs)()
    return (perf_counter() - began) / STEPS / width


def row_of(model: ModelDescription, seed: int) -> Row:
    return Row(sample_table(model.schedule, "ddim", STEPS), seed, model.group)


def warm_engine(stack: Stack) -> Engine:
    group = stack.model.group
    engine = Engine(
        {group: stack.runner()}, {group: probe_row(stack.model, group, Condition())}, Places(JOBS), Metrics()
    )
    engine.start()
    engine.wait_loaded()
    return engine


def through_slots(stack: Stack) -> float:
    width = stack.backend.widths[-1]
    runner = stack.runner()
    slots = [runner.admit(row_of(stack.model, seed)) for seed in range(width)]
    began = perf_counter()
    for line in range(STEPS):
        runner.step([Forward(slot, 0, line) for slot in slots])
    return (perf_counter() - began) / STEPS / width


def through_engine(engine: Engine, model: ModelDescription) -> float:
    """Twice as many jobs are in flight as a pass has rows."""
    began = perf_counter()

    def submit(seed: int) -> Future[Finished]:
        return engine.submit([row_of(model, seed)], 600, "bench").future

    pending = {submit(seed) for seed in range(2 * engine.widths[-1])}
    to_come = JOBS - len(pending)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for _ in range(min(len(done), to_come)):
            pending.add(submit(to_come))
            to_come -= 1
    return (perf_counter() - began) / STEPS / JOBS


def through_http(server: Server) -> float:
    with server.awake():
        return 1 / at_once(server.url, JOBS, [STEPS], seed=0, sampler="ddim").images_per_s / STEPS


def without_network(folder: Path, rounds: int) -> dict[str, float]:
    """Microseconds of a row's step on the host, by the outermost layer, at a width of eight."""
    model = load(folder).description
    stack = stack_of(folder, NoNetwork(model, 8))
    loop = BareLoop(stack.backend, stack.network, model, [8])
    engine = warm_engine(stack)
    cases: dict[str, Callable[[], float]] = {
        "the update": lambda: loop.seconds_per_row(8, STEPS),
        "+ slots: gather, scatter, noise": lambda: through_slots(stack),
        "+ engine and scheduler": lambda: through_engine(engine, model),
    }
    found = medians(cases, 10 * rounds)
    engine.close()
    return {name: 1000 * milliseconds for name, milliseconds in found.items()}


def layers(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of a row's step, by the outermost layer."""
    stack = stack_of(folder)
    model, width = stack.model, stack.backend.widths[-1]
    loop = BareLoop(stack.backend, stack.network, model, [width])
    engine = warm_engine(stack)
    with running(("Stepwise", "service", {"STEPWISE_WEIGHTS": str(folder)})) as [server]:
        cases: dict[str, Callable[[], float]] = {
            "the network": lambda: through_network(stack),
            "+ the update": lambda: loop.seconds_per_row(width, STEPS),
            "+ slots: gather, scatter, noise": lambda: through_slots(stack),
            "+ engine and scheduler": lambda: through_engine(engine, model),
            "+ HTTP, PNG, load generator": lambda: through_http(server),
        }
        found = medians(cases, rounds)
    engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each layer is measured")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as work:
        small = Path(work) / "small"
        write(small, SMALL)
        found = {"small": layers(small, rounds), "digits": layers(BOX / "digits", rounds)}
        host = {"small": without_network(small, rounds), "digits": without_network(BOX / "digits", rounds)}
    record.save(
        "layers",
        machine(),
        rounds,
        {
            "layers": table("ms of a row's step", "{:.3f}", found),
            "host": table("µs of a row's step without a network", "{:.0f}", host),
            "share": record.Table("", dict.fromkeys(found, "{:.1%}"), {"all three": host_share(found, host)}),
        },
    )


def table(corner: str, form: str, columns: Mapping[str, Mapping[str, float]]) -> record.Table:
    layers = next(iter(columns.values()))
    rows = {layer: [column[layer] for column in columns.values()] for layer in layers}
    return record.Table(corner, dict.fromkeys(columns, form), rows)


def host_share(found: Mapping[str, Mapping[str, float]], host: Mapping[str, Mapping[str, float]]) -> list[float]:
    """The host's share of a row's step through the engine."""
    layer = "+ engine and scheduler"
    return [host[name][layer] / 1000 / found[name][layer] for name in found]


if __name__ == "__main__":
    main()
