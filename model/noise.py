"""Noise that depends on the seed alone: one generator on the CPU for each image, as diffusers draws it."""

import torch
from torch import Tensor

from model.rows import Image


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    """The generator's next unit noise, float32 [C, H, W]. diffusers draws (1, C, H, W) for each of its generators."""
    return torch.randn((1, *shape), generator=rng)[0]


def first_draw(seed: int, shape: tuple[int, int, int]) -> Image:
    """The noise that an image of this seed starts from, float32 [C, H, W]."""
    noise: Image = draw(generator(seed), shape).numpy()
    return noise
