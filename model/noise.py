"""Noise that depends only on the seed: one CPU generator for each image, as in diffusers."""

import torch
from torch import Tensor

from model.rows import Image


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    """The generator's next unit noise, float32 [C, H, W]. The same values as diffusers' (1, C, H, W)."""
    return torch.randn((1, *shape), generator=rng)[0]


def first_draw(seed: int, shape: tuple[int, int, int]) -> Image:
    """The noise that a row with this seed starts from, float32 [C, H, W]."""
    noise: Image = draw(generator(seed), shape).numpy()
    return noise
