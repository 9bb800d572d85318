"""Distil weights: a few steps of the student lead to the same image as many guided steps of its teacher.

    python -m weights.distill FOLDER

Reads config.json (network, schedule and recommended steps) and distillation.toml from the folder, and writes
model.safetensors there.

First the teacher draws trajectories, which are kept in FOLDER/work. Their timesteps are the student's and finer ones
between these. At each of its timesteps, the student learns the prediction that leads to the teacher's x at its next
timestep. This is progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, section 3) in one stage, which also
distils the teacher's guidance (Meng et al. 2023, arXiv:2210.03142). In a share of the examples, x is the student's own
instead of the teacher's, so that the student learns to correct its errors.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.checkpoints import native
from model.checkpoints.config import DiffusionUNetConfig
from model.checkpoints.load import load
from model.noise import draw, generator
from model.samplers import StepTable, sample_table
from model.update import guided, remembered, update
from weights import descent
from weights.descent import Descent, Pace, random_numbers

RECIPE = "distillation.toml"
AT_ONCE = 500  # trajectories


@dataclass(frozen=True)
class Distillation(Pace):
    """The fields of distillation.toml, which explains them."""

    teacher: str
    teacher_sampler: str
    teacher_steps: int
    guidance_scale: float
    trajectories: int
    unlabelled: float
    own_states: float


class Trajectories(NamedTuple):
    """The teacher's trajectories.

    Attributes:
        images: x at each of the student's N timesteps and at the end, float16 [K, N + 1, C, H, W].
        labels: [K]; num_classes means "no label".
    """

    images: Tensor
    labels: Tensor


def walk(
    network: nn.Module, table: StepTable, x: Tensor, labels: Tensor, no_label: int, guidance_scale: float, every: int
) -> list[Tensor]:
    """Take all steps of a table from pure noise x [B, C, H, W]. Return x before them and after each `every` steps.

    Rows with a label are guided.
    """
    device = x.device
    scale = torch.where(labels == no_label, 1.0, guidance_scale)
    lines = torch.from_numpy(table.lines.astype(np.float32)).to(device)
    noise = torch.zeros_like(x)
    x = x * table.init
    images, memories = [x], list[Tensor]()
    for i, step in enumerate(table.steps):
        t = torch.full((2 * len(x),), step.timestep, device=device)
        with descent.autocast(device):
            both = network(torch.cat([x, x]), t, torch.cat([labels, torch.full_like(labels, no_label)])).float()
        own, without_label = both.chunk(2)
        out, line = guided([own, without_label], scale), lines[i].expand(len(x), -1)
        x_next, x0 = update(x, out, memories[: step.reads], noise, line)
        if step.remembers:
            memories = [remembered(x, x0, out, line), *memories[:2]]
        x = x_next
        if (i + 1) % every == 0:
            images.append(x)
    return images


@torch.inference_mode()
def drawn_by(
    teacher: nn.Module,
    config: DiffusionUNetConfig,
    recipe: Distillation,
    device: torch.device,
) -> Trajectories:
    steps = config.recommended_settings.num_inference_steps
    table = sample_table(config.schedule, recipe.teacher_sampler, recipe.teacher_steps)
    no_label = _no_label(config)
    every = recipe.teacher_steps // steps
    shape = (config.in_channels, *config.image_size)
    images, all_labels = [], []
    for first in tqdm(range(0, recipe.trajectories, AT_ONCE), desc="drawing", unit_scale=AT_ONCE, unit="trajectory"):
        seeds = range(first, min(first + AT_ONCE, recipe.trajectories))
        labels = torch.arange(seeds.start, seeds.stop) % no_label
        labels[torch.rand(len(labels), generator=random_numbers(recipe.seed, first)) < recipe.unlabelled] = no_label
        # Other seeds than those of quality.py, and than users' first.
        noise = torch.stack([draw(generator(2**40 + seed), shape) for seed in seeds])
        walked = walk(teacher, table, noise.to(device), labels.to(device), no_label, recipe.guidance_scale, every)
        images.append(torch.stack([x.half().cpu() for x in walked], dim=1))
        all_labels.append(labels)
    return Trajectories(torch.cat(images), torch.cat(all_labels))


class Example(NamedTuple):
    """The batch of a training step.

    Attributes:
        noise: the first x of each trajectory.
        x: the teacher's x before the student's step.
        steps: numbers of the student's steps.
        labels: of the trajectories.
        target: the teacher's x after the student's step.
        own: whether to use the student's own x instead of the teacher's.
    """

    noise: Tensor
    x: Tensor
    steps: Tensor
    labels: Tensor
    target: Tensor
    own: Tensor


def examples_at(step: int, trajectories: Trajectories, recipe: Distillation) -> Example:
    images, labels = trajectories
    rng = random_numbers(recipe.seed + 1, step)
    chosen = torch.randint(len(images), (recipe.batch_size,), generator=rng)
    steps = torch.arange(recipe.batch_size) % (images.shape[1] - 1)
    own = torch.rand(recipe.batch_size, generator=rng) < recipe.own_states
    return Example(
        images[chosen, 0].float(),
        images[chosen, steps].float(),
        steps,
        labels[chosen],
        images[chosen, steps + 1].float(),
        own,
    )


class Student:
    """The student's network and its steps."""

    def __init__(self, network: nn.Module, table: StepTable, device: torch.device) -> None:
        self._network = network
        self._lines = torch.from_numpy(table.lines.astype(np.float32)).to(device)
        self._timesteps = torch.tensor(table.timesteps, dtype=torch.float32).to(device)
        self._init = table.init
        self._device = device

    def predict(self, x: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        with descent.autocast(self._device):
            out: Tensor = self._network(x, self._timesteps[steps], labels)
        return out.float()

    def next(self, x: Tensor, out: Tensor, steps: Tensor) -> Tensor:
        """x [B, C, H, W] after one step each, given the predictions `out`."""
        zeros = torch.zeros_like(x)
        return update(x, out, (), zeros, self._lines[steps])[0]

    def wanted(self, x: Tensor, target: Tensor, steps: Tensor) -> Tensor:
        """The prediction with which a step leads from x to `target`. A step is linear in the prediction."""
        base = self.next(x, torch.zeros_like(x), steps)
        slope = self.next(x, torch.ones_like(x), steps) - base
        return (target - base) / slope

    @torch.no_grad()
    def own_states(self, noise: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        """The student's own x before the steps with numbers `steps` [B], from pure noise."""
        x = noise * self._init
        for number in range(int(steps.max())):
            left = steps > number
            step = torch.full_like(steps[left], number)
            x[left] = self.next(x[left], self.predict(x[left], step, labels[left]), step)
        return x


def distil(folder: Path) -> None:
    config = native.read_config(folder)
    if not isinstance(config, DiffusionUNetConfig):
        raise SystemExit(f"{folder / native.CONFIG}: the recipe distils diffusion_unet, not {config.architecture}")
    if config.schedule.prediction_type == "epsilon":
        raise SystemExit(
            f"{folder / native.CONFIG}: prediction_type must not be epsilon, which says nothing about x_0 at pure noise"
        )
    path = folder / RECIPE
    recipe = Distillation.read(path)
    settings = config.recommended_settings
    if recipe.teacher_steps % settings.num_inference_steps:
        raise SystemExit(f"{path}: teacher_steps must be a multiple of {settings.num_inference_steps}")
    teacher_folder = folder / recipe.teacher
    teacher = load(teacher_folder).network
    device = descent.available_device()
    torch.manual_seed(recipe.seed)

    key = descent.digest(folder / native.CONFIG, path, teacher_folder / native.WEIGHTS)
    network = config.build()
    network.load_state_dict(teacher.state_dict())
    for one in (teacher, network):
        one.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    trajectories = _kept(folder / "work" / "trajectories.pt", key)
    if trajectories is None:
        trajectories = drawn_by(teacher, config, recipe, device)
        descent.save_whole({"key": key, **trajectories._asdict()}, folder / "work" / "trajectories.pt")
    student = Student(network, sample_table(config.schedule, settings.sampler, settings.num_inference_steps), device)

    def loss_of(example: Example) -> Tensor:
        noise, x, steps, labels, target, own = (part.to(device) for part in example)
        if own.any():
            x[own] = student.own_states(noise[own], steps[own], labels[own])
        wanted = student.wanted(x, target, steps)
        return (student.predict(x, steps, labels) - wanted).square().mean()

    work = Descent(network, recipe, folder / "work" / "training.pt", key)
    work.run(lambda step: examples_at(step, trajectories, recipe), loss_of)
    work.end()
    descent.write(network, folder / native.WEIGHTS)


def _kept(path: Path, key: str) -> Trajectories | None:
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            return Trajectories(saved["images"], saved["labels"])
    return None


def _no_label(config: DiffusionUNetConfig) -> int:
    if config.num_classes is None:
        raise SystemExit("the recipe distils networks with classes")
    return config.num_classes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.distill", description="Distil weights into few steps.")
    parser.add_argument("folder", type=Path, help="a folder with config.json and distillation.toml")
    distil(parser.parse_args().folder)


if __name__ == "__main__":
    main()
