"""The bare loop: the network and the sampler's update, over fixed rows. No server can be faster.

The loop has the server's backend and passes. It has no HTTP, no scheduler, no noise and no PNG.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from model.backends.backend import Backend
from model.backends.choose import choose
from model.backends.network import Network, denoiser
from model.backends.torch_cpu import TorchCPUBackend
from model.checkpoints.load import load
from model.description import ModelDescription
from model.samplers import sample_table
from model.update import guided, remembered, update
from service.config import available_cores

STEPS = 10


def random_inputs(network: Network, rows: int) -> dict[str, Tensor]:
    """Inputs of a pass at the size that the weights were trained for, always the same."""
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn((rows, *shape), generator=rng) for name, shape in network.inputs.items()}


class BareLoop:
    """Trajectories at several widths.

    Args:
        backend: the network.
        network: what the backend runs.
        model: the network's description.
        widths: to try.
    """

    def __init__(self, backend: Backend, network: Network, model: ModelDescription, widths: Sequence[int]) -> None:
        self._backend = backend
        self._network = network
        self._model = model
        self._widths = widths
        for width in widths:  # compiles everything needed
            for _ in range(3):
                self.seconds_per_row(width)

    @torch.inference_mode()
    def seconds(self, width: int, steps: int, sampler: str = "ddim", guidance_scale: float = 1.0) -> float:
        """Seconds of one trajectory of `width` rows. With guidance, an image takes two rows."""
        branches = 1 if guidance_scale == 1 else 2
        table = sample_table(self._model.schedule, sampler, steps)
        lines = torch.tensor(table.lines).float()
        x = torch.randn((width // branches, *self._model.sample_shape), generator=torch.Generator().manual_seed(0))
        noise = torch.zeros_like(x)
        memories: list[Tensor] = []
        scale = torch.full((len(x),), guidance_scale)
        others = random_inputs(self._network, branches * len(x))
        began = perf_counter()
        for i, step in enumerate(table.steps):
            rows = x if branches == 1 else torch.cat([x, x])
            out = self._backend.start({**others, "x": rows})()
            if branches == 2:
                out = guided(out.chunk(2), scale)
            line = lines[i].expand(len(x), -1)
            x_next, x0 = update(x, out, memories[: step.reads], noise, line)
            if step.remembers:
                memories = [remembered(x, x0, out, line), *memories[:2]]
            x = x_next
        return perf_counter() - began

    def seconds_per_row(self, width: int, steps: int = STEPS) -> float:
        """Seconds of a step of one row, over a trajectory at one width."""
        return self.seconds(width, steps) / steps / width

    def best_width(self, at_least: int, rounds: int = 5) -> int:
        """The width with the lowest cost of a row: the best of some rounds through all widths."""
        costs = dict.fromkeys((width for width in self._widths if width >= at_least), math.inf)
        for _ in range(rounds):
            costs = {width: min(least, self.seconds_per_row(width)) for width, least in costs.items()}
        return min(costs, key=costs.__getitem__)


def openvino_loop(folder: Path, *widths: int) -> BareLoop:
    """A loop on the server's backend at these widths; by default, the powers of two among the server's widths."""
    checkpoint = load(folder)
    model = checkpoint.description
    widest = max(widths, default=None)
    cpu = torch.device("cpu")
    network = denoiser(checkpoint.network, model)
    backend = choose(network, cpu, "auto", available_cores(), widest, cache_dir=None)(model.sample_shape)
    return BareLoop(backend, network, model, widths or [width for width in backend.widths if width.bit_count() == 1])


def torch_loop(folder: Path, width: int) -> BareLoop:
    torch.set_num_threads(available_cores())
    checkpoint = load(folder)
    model = checkpoint.description
    network = denoiser(checkpoint.network, model)
    return BareLoop(TorchCPUBackend(network.module, network.inputs, "float32", width), network, model, [width])
