"""How a row begins: what its generator draws before the first step, and what that makes of an image and a mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from model.noise import draw
from model.rows import Moments, Row


class Beginning(NamedTuple):
    """A row before its first step, on the CPU.

    Attributes:
        x: [C, H, W].
        beside: what a network that inpaints takes beside x at each step: the mask and the masked image's latents,
            [1 + C, H, W]. None for other networks.
        kept: what is blended into the row after each line: the mask, the image's latents and the first noise,
            [3, C, H, W]. None for rows that keep nothing.
    """

    x: Tensor
    beside: Tensor | None = None
    kept: Tensor | None = None


def beginning(row: Row, rng: torch.Generator, shape: tuple[int, int, int]) -> Beginning:
    """Draw what a row begins from, in the order of model.rows.Source.

    Args:
        rng: the row's generator, of which nothing is drawn yet.
        shape: (C, H, W) of x.
    """
    source = row.source
    if source is None:
        noise = draw(rng, shape)
        return Beginning(noise * row.table.init if row.start is None else torch.from_numpy(row.start))
    image = None if source.image is None else _latents(source.image, rng, shape)
    noise = draw(rng, shape)
    if image is None or source.from_noise:
        x = noise * row.table.init
    else:
        signal, deviation = row.table.levels[0].tolist()
        x = signal * image + deviation * noise
    if source.mask is None:
        return Beginning(x)
    mask = torch.tensor(source.mask, dtype=torch.float32).unsqueeze(0)
    if source.masked is not None:
        return Beginning(x, beside=torch.cat([mask, _latents(source.masked, rng, shape)]))
    if source.image is not None and source.image.std is not None:
        draw(rng, shape)  # the pipelines draw latents of the masked image, and do not use them
    assert image is not None
    return Beginning(x, kept=torch.stack([mask.expand(shape), image, noise]))


def _latents(moments: Moments, rng: torch.Generator, shape: tuple[int, int, int]) -> Tensor:
    """Latents of an image, [C, H, W]: drawn, if there is something to draw."""
    mean = torch.tensor(moments.mean)
    if moments.std is None:
        return mean
    return mean + torch.tensor(moments.std) * draw(rng, shape)
