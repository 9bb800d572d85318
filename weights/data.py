"""The data that weights are trained on: a fixed split, scaled to −1 … 1."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from weights.descent import random_numbers


@dataclass(frozen=True)
class Split:
    """Images, float32 [N, C, H, W] in −1 … 1, and labels, int64 [N]. Four fifths are for training."""

    train_x: Tensor
    train_y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    @property
    def classes(self) -> int:
        return int(torch.cat([self.train_y, self.held_out_y]).max()) + 1


def load(path: Path) -> Split:
    """Read a data file: `x`, uint8 [N, H, W] or [N, H, W, C], and `y`, the labels.

    numpy's default_rng(1) makes the split, whatever the training's seed.
    """
    with np.load(path) as data:
        x, y = scaled(data["x"]), torch.from_numpy(data["y"]).long()
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(x)))
    train, held_out = order[: len(x) * 4 // 5], order[len(x) * 4 // 5 :]
    return Split(x[train], y[train], x[held_out], y[held_out])


def scaled(pixels: NDArray[np.uint8]) -> Tensor:
    """Map [N, H, W] or [N, H, W, C] to −1 … 1, [N, C, H, W]."""
    x = torch.from_numpy(pixels).float() / 127.5 - 1
    return x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()


def chosen(step: int, deck: Tensor, batch_size: int, seed: int) -> Tensor:
    """The images of a step, [batch_size], by index: the next of a deck that is shuffled in each epoch."""
    epoch, place = divmod(step, len(deck) // batch_size)
    order = torch.randperm(len(deck), generator=random_numbers(seed, -1 - epoch))
    return deck[order[place * batch_size : (place + 1) * batch_size]]


def evened(y: Tensor, power: float) -> Tensor:
    """A deck of image indices that repeats the images of small classes.

    Each class's share is about proportional to size ** power: 1 changes nothing, 0 makes the shares equal.
    """
    sizes = torch.bincount(y).double()
    times = (sizes.max() / sizes.clamp(min=1)).pow(1 - power).round().long()
    return torch.arange(len(y)).repeat_interleave(times[y])


def shifted(x: Tensor, reach: int, rng: torch.Generator) -> Tensor:
    """Move each image of x [N, C, H, W] by up to `reach` pixels along each axis. Border pixels fill the gap."""
    H, W = x.shape[2:]
    shifts = torch.randint(-reach, reach + 1, (len(x), 2), generator=rng)
    wider = F.pad(x, (reach,) * 4, mode="replicate")
    corners = (reach - shifts).tolist()
    return torch.stack([image[:, i : i + H, j : j + W] for image, (i, j) in zip(wider, corners, strict=True)])
