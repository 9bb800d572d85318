"""Digits as the service draws them: by the same backend, runner and step tables, to 8-bit pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PillowImage
from tqdm import tqdm

from model.backends.backend import Backend
from model.backends.choose import Choice, choose
from model.checkpoints.load import load
from model.description import ModelDescription, Recommended
from model.rows import Forward, Row
from model.runner import SlotRunner
from model.samplers import sample_table
from service.config import available_cores
from service.images import UInt8, to_uint8

CLASSES = 10
WIDTH = 64  # rows of one forward pass


@dataclass(frozen=True)
class Pen:
    """Loaded weights, and what computes them."""

    backend: Backend
    model: ModelDescription


def pen(folder: Path, precision: Choice) -> Pen:
    """Load a folder of weights. Raises CheckpointError."""
    checkpoint = load(folder)
    cpu = torch.device("cpu")
    description = checkpoint.description
    backend = choose(checkpoint.network, description, cpu, precision, available_cores(), WIDTH, cache_dir=None)
    return Pen(backend, description)


def draw(by: Pen, settings: Recommended, seed: int, number: int) -> UInt8:
    """Draw digits, [number, H, W]; digit i has the label i % 10 and seed + i. Raises GridError."""
    last = settings.num_inference_steps
    return np.concatenate([_pixels(at) for at in _walk(by, settings, seed, number) if at.step == last])


def draw_along(by: Pen, settings: Recommended, seed: int, number: int) -> UInt8:
    """The same digits after each step, the noise first: [steps + 1, number, H, W]."""
    images: list[list[UInt8]] = [[] for _ in range(settings.num_inference_steps + 1)]
    for at in _walk(by, settings, seed, number):
        images[at.step].append(_pixels(at))
    return np.stack([np.concatenate(parts) for parts in images])


class _At(NamedTuple):
    """Where some digits are: after so many steps, in these slots."""

    step: int
    runner: SlotRunner
    slots: list[int]


def _walk(by: Pen, settings: Recommended, seed: int, number: int) -> Iterator[_At]:
    """As many digits as fit into a pass at a time: ahead of the first step, and after each."""
    table = sample_table(by.model.schedule, settings.sampler, settings.num_inference_steps)
    runner = SlotRunner(by.backend, by.model.image_shape, no_label=CLASSES, slots=WIDTH)
    rows = [Row(table, seed + i, label=i % CLASSES, guidance_scale=settings.guidance_scale) for i in range(number)]
    branches = range(rows[0].forwards_per_step)
    at_once = WIDTH // len(branches)

    with tqdm(desc="drawing", total=len(rows), unit="digit") as bar:
        for first in range(0, len(rows), at_once):
            slots = [runner.admit(row) for row in rows[first : first + at_once]]
            yield _At(0, runner, slots)
            for step in range(1, len(table) + 1):
                runner.step([Forward(slot, branch) for slot in slots for branch in branches])
                yield _At(step, runner, slots)
            for slot in slots:
                runner.release(slot)
            bar.update(len(slots))


def _pixels(at: _At) -> UInt8:
    return np.stack([to_uint8(at.runner.read(slot).x)[:, :, 0] for slot in at.slots])


def by_class(pixels: UInt8, columns: int) -> UInt8:
    """A sheet of the first digits [N, H, W] of each class, one class a row, as they were drawn: none is left out."""
    _, H, W = pixels.shape
    first = pixels.reshape(-1, CLASSES, H, W)[:columns]
    return first.transpose(1, 2, 0, 3).reshape(CLASSES * H, -1)


def save(path: Path, pixels: UInt8, enlarged: int = 1) -> None:
    """Save a picture [H, W], each pixel as a square."""
    PillowImage.fromarray(pixels.repeat(enlarged, 0).repeat(enlarged, 1)).save(path)
    print(f"picture: {path}")
