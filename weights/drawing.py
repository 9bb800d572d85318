"""Draws images with the service's backends, runner and step tables, as 8-bit pixels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from tqdm import tqdm

from model.backends.backend import Backend
from model.backends.choose import Choice, choose
from model.backends.network import denoiser
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import load
from model.conditions import Conditions
from model.description import ModelDescription, Recommended
from model.rows import VAE, Condition, Forward, Image, Row
from model.runner import SlotRunner
from model.samplers import sample_table
from model.vae import choose_vae
from service.config import available_cores
from service.http.png import UInt8, to_uint8
from service.plan.guidance import ALL_STEPS, Interval

WIDTH = 64  # rows of one forward pass


@dataclass(frozen=True)
class Pen:
    """Loaded weights and their backends.

    Attributes:
        conditions: what rows are given beside x.
        vae: the VAE, for latent diffusion.
        classes: the number of classes. Image i has the label i % classes.
    """

    backend: Backend
    model: ModelDescription
    conditions: Conditions
    vae: VAE | None
    classes: int

    def runner(self, slots: int) -> SlotRunner:
        return SlotRunner(self.backend, self.model.sample_shape, self.conditions, slots)

    @property
    def class_names(self) -> Sequence[str]:
        return self.model.class_names or [str(label) for label in range(self.classes)]


def pen(folder: Path, precision: Choice) -> Pen:
    """Load a folder of weights. Raises CheckpointError, also for weights without labels or without "no label"."""
    checkpoint = load(folder)
    model = checkpoint.description
    if model.num_classes is None or model.no_label is None:
        raise CheckpointError(folder, "num_classes: must be there, and the network know images without a label")
    how = torch.device("cpu"), precision, available_cores()
    backend = choose(denoiser(checkpoint.network, model), *how, WIDTH, cache_dir=None)(model.sample_shape)
    conditions = Conditions(checkpoint.network.embedder, backend, model.no_label)
    vae = None
    if checkpoint.autoencoder is not None:
        vae = choose_vae(checkpoint.autoencoder, model, *how, cache_dir=None)(model.group, None)
    return Pen(backend, model, conditions, vae, model.num_classes)


def draw(by: Pen, settings: Recommended, seed: int, number: int, guidance_interval: Interval = ALL_STEPS) -> UInt8:
    """Draw images, [number, H, W] or [number, H, W, 3]. Image i has the label i % classes and the seed `seed` + i.

    Raises GridError.
    """
    walk = _walk(by, settings, seed, number, guidance_interval)
    return np.concatenate([_pixels(by, at) for at in walk if at.step == _lines(by, settings)])


def draw_along(by: Pen, settings: Recommended, seed: int, number: int) -> UInt8:
    """The same images before the first line and after each line, [lines + 1, number, …]."""
    images: list[list[UInt8]] = [[] for _ in range(_lines(by, settings) + 1)]
    for at in _walk(by, settings, seed, number):
        images[at.step].append(_pixels(by, at))
    return np.stack([np.concatenate(parts) for parts in images])


def reconstructed(vae: VAE, x: Tensor) -> UInt8:
    """Encode and decode images [N, C, H, W], and return the pixels."""
    images = tqdm(x.numpy(), desc="encoding", unit="image")
    return _decoded(vae, [vae.encode(image).mean for image in images])


def _lines(by: Pen, settings: Recommended) -> int:
    return len(sample_table(by.model.schedule, settings.sampler, settings.num_inference_steps))


class _At(NamedTuple):
    """The rows of one batch: after `step` lines, in these slots."""

    step: int
    runner: SlotRunner
    slots: list[int]


def _walk(
    by: Pen, settings: Recommended, seed: int, number: int, guidance_interval: Interval = ALL_STEPS
) -> Iterator[_At]:
    """Draw in batches that fill a pass. Yields before the first line of a batch, and after each."""
    table = sample_table(by.model.schedule, settings.sampler, settings.num_inference_steps)
    runner, scale = by.runner(slots=WIDTH), settings.guidance_scale
    others = () if scale == 1 else (Condition(),)
    rows = [
        Row(
            table,
            seed + i,
            by.model.group,
            branches=(Condition(i % by.classes), *others),
            guidance_scale=scale,
            guidance_interval=guidance_interval,
        )
        for i in range(number)
    ]
    at_once = WIDTH // (1 + len(others))

    with tqdm(desc="drawing", total=len(rows), unit="image") as bar:
        for first in range(0, len(rows), at_once):
            slots = [runner.admit(row) for row in rows[first : first + at_once]]
            yield _At(0, runner, slots)
            for line in range(len(table)):
                runner.step(
                    [Forward(slot, branch, line) for slot in slots for branch in range(rows[first].forwards[line])]
                )
                yield _At(line + 1, runner, slots)
            for slot in slots:
                runner.release(slot)
            bar.update(len(slots))


def _pixels(by: Pen, at: _At) -> UInt8:
    samples = [at.runner.read(slot).x for slot in at.slots]
    return to_pixels(samples) if by.vae is None else _decoded(by.vae, samples)


def _decoded(vae: VAE, latents: list[Image]) -> UInt8:
    most = vae.widths[-1]
    parts = [vae.decode(latents[first : first + most]) for first in range(0, len(latents), most)]
    return to_pixels([image for part in parts for image in part])


def to_pixels(images: Iterable[Image]) -> UInt8:
    """Map images, [C, H, W] in −1 … 1, to [N, H, W] for one channel, or [N, H, W, C]."""
    pixels = np.stack([to_uint8(image) for image in images])
    return pixels[..., 0] if pixels.shape[3] == 1 else pixels


def by_class(pixels: UInt8, classes: int, columns: int) -> UInt8:
    """A sheet of the first images of each class, unselected. Each line of the sheet has one class."""
    first = pixels.reshape(-1, classes, *pixels.shape[1:])[:columns]
    return sheet(first.swapaxes(0, 1))


def sheet(lines: UInt8) -> UInt8:
    """Join images [lines, columns, H, W] or [lines, columns, H, W, 3] into one picture."""
    return np.concatenate([np.concatenate(list(line), axis=1) for line in lines])


def save(path: Path, pixels: UInt8, enlarged: int = 1) -> None:
    """Save a picture [H, W] or [H, W, 3]. Each pixel becomes a square of `enlarged` pixels."""
    PillowImage.fromarray(pixels.repeat(enlarged, 0).repeat(enlarged, 1)).save(path, optimize=True)
    print(f"picture: {path}")
