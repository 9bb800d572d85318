"""The digits as training sees them: a split that never changes, scaled to −1 … 1."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images, float32 [N, 1, H, W] in −1 … 1, and labels, int64 [N]: four fifths to train on, the rest held out."""

    train_x: Tensor
    train_y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor


def load(path: Path) -> Split:
    """Read a data file. The split is that of numpy's default_rng(1), whatever the training's seed."""
    with np.load(path) as data:
        x = torch.from_numpy(data["x"]).float()[:, None] / 127.5 - 1
        y = torch.from_numpy(data["y"])
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(x)))
    train, held_out = order[: len(x) * 4 // 5], order[len(x) * 4 // 5 :]
    return Split(x[train], y[train], x[held_out], y[held_out])


def shifted(x: Tensor, reach: int, rng: torch.Generator) -> Tensor:
    """Move each image of x [N, C, H, W] by up to `reach` pixels each way; its black border must be that wide."""
    shifts = torch.randint(-reach, reach + 1, (len(x), 2), generator=rng)
    return torch.stack([image.roll(tuple(shift), (1, 2)) for image, shift in zip(x, shifts.tolist(), strict=True)])
