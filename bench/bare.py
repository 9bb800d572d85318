"""The limit: the network and the sampler's update in a loop over rows that never change. No HTTP, no scheduler."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from model.backends.backend import Backend
from model.backends.choose import choose
from model.backends.network import denoiser
from model.backends.torch_cpu import TorchCPUBackend
from model.checkpoints.load import load
from model.description import ModelDescription
from model.samplers import sample_table
from model.update import update
from service.config import available_cores

STEPS = 10


class BareLoop:
    """DDIM at one width after the other.

    Args:
        backend: the network.
        model: what the network is.
        widths: those to try.
    """

    def __init__(self, backend: Backend, model: ModelDescription, widths: Sequence[int]) -> None:
        self._backend = backend
        self._model = model
        self._widths = widths
        for width in widths:  # until what is needed is compiled
            for _ in range(3):
                self.seconds_per_row(width)

    def seconds_per_row(self, width: int, steps: int = STEPS) -> float:
        """Of a row's step, over a trajectory at one width."""
        table = sample_table(self._model.schedule, "ddim", steps)
        lines = torch.tensor(table.lines).float()
        x = torch.randn((width, *self._model.sample_shape), generator=torch.Generator().manual_seed(0))
        x0 = noise = torch.zeros_like(x)
        labels = torch.zeros(width, dtype=torch.int64)
        began = perf_counter()
        for i in range(steps):
            timesteps = torch.full((width,), int(table.timesteps[i]))
            out = self._backend.start(x, timesteps, labels)()
            x, x0 = update(x, out, x0, noise, lines[i].expand(width, -1), ())
        return (perf_counter() - began) / steps / width

    def best(self) -> float:
        """The fewest seconds of a row's step, over the widths."""
        return min(self.seconds_per_row(width) for width in self._widths)


def openvino_loop(folder: Path, *widths: int) -> BareLoop:
    checkpoint = load(folder)
    model = checkpoint.description
    cpu = torch.device("cpu")
    backend = choose(denoiser(checkpoint.network, model), cpu, "auto", available_cores(), max(widths), cache_dir=None)
    return BareLoop(backend, model, widths)


def torch_loop(folder: Path, width: int) -> BareLoop:
    torch.set_num_threads(available_cores())
    checkpoint = load(folder)
    model = checkpoint.description
    return BareLoop(TorchCPUBackend(checkpoint.network, model.sample_shape, "float32", width), model, [width])
