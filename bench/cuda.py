"""Check and time the CUDA backend on this machine's GPU.

    python -m bench.cuda [--device cuda:0] [--max-batch 32] [--rounds 50]

Measures the digits in the box, and a network of the size of google/ddpm-cifar10-32 with random weights, in float32 and
in bfloat16. Writes bench/figures/cuda.json, with three tables. The first checks promises: the width that was chosen;
whether a row has the same bits alone and in a crowd; and the error against the CPU. The second has medians by the rows
of a pass: the network; a whole step; the step's host work and update; and a plain loop of the same network, in parts of
a step. The plain loop does what the diffusers library does: eager, in float32, all rows at the same step. It runs with
torch's default, which is TF32 in convolutions, and without TF32. The third table has the second's widest passes.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from bench import record
from bench.architectures import CIFAR10
from bench.machine import machine
from model.backends.backend import Backend, Precision
from model.backends.cuda import CudaBackend
from model.backends.network import Denoiser
from model.checkpoints.load import load
from model.conditions import Conditions
from model.lines import Column
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D, UNet2DConfig
from model.rows import Condition, Forward, Group, Reading, Row
from model.runner import SlotRunner
from model.samplers import sample_table
from model.schedule import Schedule
from service.build import BOX

WARM_UP = 5  # rounds that do not count
STEPS = 50  # of an image


@dataclass(frozen=True)
class Model:
    """A network on the CPU in float32, and the parts of its rows."""

    name: str
    unet: DiffusionUNet | UNet2D
    image_shape: tuple[int, int, int]
    no_label: int | None
    schedule: Schedule

    def inputs(self, timesteps: Sequence[float]) -> dict[str, Tensor]:
        """Random images, each at its own timestep and without a label."""
        x = torch.randn((len(timesteps), *self.image_shape), generator=torch.Generator().manual_seed(0))
        embedder = self.unet.embedder
        emb = embedder.of_time(torch.tensor(timesteps, dtype=torch.float32), None)
        if embedder.of_label is not None and self.no_label is not None:
            emb = emb + embedder.of_label(torch.tensor([self.no_label]))
        return {"x": x, "emb": emb}


def models() -> list[Model]:
    digits = load(BOX / "digits")
    described = digits.description
    assert described.no_label is not None
    assert isinstance(digits.network, DiffusionUNet)
    torch.manual_seed(0)
    fields = {name: value for name, value in CIFAR10.items() if name != "sample_size"}
    cifar10 = UNet2D(UNet2DConfig(**fields)).requires_grad_(False).eval()
    return [
        Model("digits", digits.network, described.image_shape, described.no_label, described.schedule),
        Model("cifar10", cifar10, (3, 32, 32), None, Schedule()),
    ]


def runner_of(model: Model, backend: Backend, slots: int) -> SlotRunner:
    embedder = copy.deepcopy(model.unet).to(backend.device).embedder
    return SlotRunner(backend, model.image_shape, Conditions(embedder, backend, model.no_label), slots)


def forwards(row: Row, slot: int, line: int) -> list[Forward]:
    return [Forward(slot, branch, line) for branch in range(row.forwards[line])]


# Promises.


def error_against_cpu(model: Model, backend: Backend) -> float:
    """The largest difference of a prediction, relative to the largest value."""
    rows = min(4, backend.widths[-1])
    with torch.inference_mode():
        inputs = model.inputs([333.0 * row for row in range(rows)])
        exact = model.unet.denoise(**inputs)
    out = backend.start({name: backend.send(values) for name, values in inputs.items()})().cpu()
    return float((out - exact).abs().max() / exact.abs().max())


def mixed_rows(model: Model) -> list[Row]:
    """Rows with different samplers, numbers of steps, noise and guidance."""

    def row(seed: int, guidance_scale: float, sampler: str, steps: int, eta: float = 0.0) -> Row:
        branches = (Condition(),) * (1 if guidance_scale == 1 else 2)
        table, group = sample_table(model.schedule, sampler, steps, eta), Group(*model.image_shape[1:])
        return Row(table, seed, group, branches=branches, guidance_scale=guidance_scale)

    return [
        row(0, 1.0, "ddpm", 10),
        row(1, 3.0, "ddim", 7),
        row(2, 1.0, "dpmpp_2m", 12),
        row(3, 1.5, "ddim", 9, eta=1.0),
        row(4, 1.0, "ddim", 5),
        row(5, 2.0, "dpmpp_2m", 4),
    ]


def drawn(runner: SlotRunner, rows: list[Row]) -> list[Reading]:
    """Run rows side by side, as many at a time as fit into a pass."""
    slots = [runner.admit(row) for row in rows]
    for step in range(max(len(row.table) for row in rows)):
        going = [(row, slot) for row, slot in zip(rows, slots, strict=True) if step < len(row.table)]
        pending = [forward for row, slot in going for forward in forwards(row, slot, step)]
        for i in range(0, len(pending), runner.widths[-1]):
            runner.step(pending[i : i + runner.widths[-1]])
    return [runner.read(slot) for slot in slots]


def same_as_alone(model: Model, backend: Backend) -> str:
    """The number of rows in a crowd with the same bits as alone."""
    rows = mixed_rows(model)
    crowd = drawn(runner_of(model, backend, len(rows)), rows)
    alone = [drawn(runner_of(model, backend, 1), [row])[0] for row in rows]
    same = sum(np.array_equal(a.x, b.x) and np.array_equal(a.x0, b.x0) for a, b in zip(crowd, alone, strict=True))
    return f"{same} of {len(rows)}"


# Times.


def median_ms(run: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median milliseconds of a call. The device is idle before and after."""
    times = []
    for _ in range(WARM_UP + rounds):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[WARM_UP:])


def pass_ms(model: Model, backend: Backend, width: int, rounds: int) -> float:
    with torch.inference_mode():
        inputs = {name: backend.send(values) for name, values in model.inputs([500.0] * width).items()}
    return median_ms(lambda: backend.start(inputs)(), rounds, backend.device)


def step_ms(model: Model, backend: Backend, width: int, rounds: int) -> float:
    runner = runner_of(model, backend, width)
    table = sample_table(model.schedule, "ddim", WARM_UP + rounds)
    slots = [runner.admit(Row(table, seed, Group(*model.image_shape[1:]))) for seed in range(width)]
    lines = iter(range(len(table)))

    def step() -> None:
        line = next(lines)
        runner.step([Forward(slot, 0, line) for slot in slots])

    return median_ms(step, rounds, backend.device)


def eager_ms(model: Model, network: nn.Module, width: int, rounds: int, device: torch.device, tf32: bool) -> float:
    """Milliseconds of a plain loop's step: the network on a batch, and DDIM's update with one line for all rows."""
    lines = iter(sample_table(model.schedule, "ddim", WARM_UP + rounds).lines.tolist())
    x = torch.randn((width, *model.image_shape), device=device)
    timesteps, labels = (torch.full((width,), value, device=device) for value in (500, model.no_label or 0))

    def step() -> Tensor:
        line: list[float] = next(lines)
        out: Tensor = network(x, timesteps, labels)
        x0: Tensor = (line[Column.P] * x + line[Column.Q] * out).clamp(-line[Column.BOUND], line[Column.BOUND])
        return line[Column.A] * x + line[Column.B] * x0 + line[Column.E] * out

    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=tf32)
    with torch.inference_mode(), flags:
        return median_ms(step, rounds, device)


# The tables.

PROMISED = {
    "width": "{}",
    "reproducible": "",
    "rows as alone": "",
    "error against the CPU": "{:.1e}",
    "to start": "{:.1f} s",
    "peak memory": "{:.0f} MB",
}
TIMES = {
    "ms a pass": "{:.2f}",
    "ms a step": "{:.2f}",
    "ms around the pass": "{:.2f}",
    f"images/s at {STEPS} steps": "{:.0f}",
    "eager with TF32 takes": "{:.2f} times",
    "eager without": "{:.2f} times",
}


def promises(model: Model, backend: CudaBackend, seconds: float) -> list[record.Cell]:
    peak = torch.cuda.max_memory_reserved(backend.device)  # memory held by graphs is reserved, not allocated
    return [
        backend.widths[-1],
        "yes" if backend.reproducible else "no",
        same_as_alone(model, backend),
        error_against_cpu(model, backend),
        seconds,
        peak / 1e6,
    ]


def times(
    model: Model, backend: CudaBackend, eager: dict[int, tuple[float, float]], rounds: int
) -> dict[int, list[record.Cell]]:
    """Times by the rows of a pass."""
    found: dict[int, list[record.Cell]] = {}
    for rows in powers_up_to(backend.widths[-1]):
        forward, step = (ms(model, backend, rows, rounds) for ms in (pass_ms, step_ms))
        beside = [plain / step for plain in eager[rows]] if rows in eager else [None, None]
        found[rows] = [forward, step, step - forward, 1000 * rows / (STEPS * step), *beside]
    return found


def made_ready(model: Model, device: torch.device, precision: Precision, max_batch: int) -> tuple[CudaBackend, float]:
    """The backend of a network, and the seconds until the backend is ready."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    unet = copy.deepcopy(model.unet)
    shapes = {"x": model.image_shape, "emb": (unet.embedder.dim,)}
    backend = CudaBackend(Denoiser(unet), shapes, device, precision, max_batch)
    return backend, time.perf_counter() - began


def powers_up_to(most: int) -> list[int]:
    """The powers of two up to `most`, and `most`."""
    return sorted({most, *(1 << i for i in range(most.bit_length()))})


def eager_times(model: Model, device: torch.device, max_batch: int, rounds: int) -> dict[int, tuple[float, float]]:
    """Milliseconds of a plain step by batch size, with TF32 and without, as far as memory allows."""
    network = copy.deepcopy(model.unet).to(device)
    found: dict[int, tuple[float, float]] = {}
    for width in powers_up_to(max_batch):
        try:
            with_tf32, without = (eager_ms(model, network, width, rounds, device, tf32) for tf32 in (True, False))
        except torch.OutOfMemoryError:
            break
        found[width] = with_tf32, without
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0), help="default: %(default)s")
    parser.add_argument("--max-batch", type=int, default=32, help="the widest pass; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=50, help="of which each time is the median; default: %(default)s")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here: torch.cuda.is_available() is false.")

    promised: dict[str, list[record.Cell]] = {}
    timed: dict[str, list[record.Cell]] = {}
    widest: dict[str, list[record.Cell]] = {}
    for model in models():
        eager = eager_times(model, args.device, args.max_batch, args.rounds)
        for precision in get_args(Precision):
            name = f"{model.name}, {precision}"
            backend, seconds = made_ready(model, args.device, precision, args.max_batch)
            promised[name] = promises(model, backend, seconds)
            by_rows = times(model, backend, eager, args.rounds)
            timed |= {f"{name}, {rows} rows": cells for rows, cells in by_rows.items()}
            widest[name] = by_rows[max(by_rows)]
            del backend  # the next backend needs its memory
    tables = {
        "promised": record.Table("network", PROMISED, promised),
        "times": record.Table("network, rows of a pass", TIMES, timed),
        "widest": record.Table("network", TIMES, widest),
    }
    gpu = f"{torch.cuda.get_device_name(args.device)}, CUDA {torch.version.cuda}; {machine()}"
    record.save("cuda", gpu, args.rounds, tables)


if __name__ == "__main__":
    main()
