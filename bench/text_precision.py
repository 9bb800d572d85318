"""Images in bfloat16 beside images in float32: figures, and a picture of both."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Levels = NDArray[np.uint8]  # [H, W, 3]

_LOUDER = 32  # times; how differences are shown
_GAP = 8  # pixels


def compared(exact: Levels, rough: Levels) -> dict[str, float]:
    """How far an image is from another: levels of 255, and decibels."""
    distance = np.abs(exact.astype(np.int16) - rough.astype(np.int16))
    error = float(np.mean(distance.astype(np.float64) ** 2))
    return {
        "mean": float(distance.mean()),
        "largest": float(distance.max()),
        "psnr": 10 * math.log10(255**2 / error) if error else math.inf,
        "beyond one": float((distance > 1).mean()),
    }


def draw(pairs: Sequence[tuple[Levels, Levels]], path: Path) -> None:
    """Save a picture: a row a pair, with the exact image, the rough one, and their difference, _LOUDER times."""
    rows = []
    for exact, rough in pairs:
        difference = _LOUDER * np.abs(exact.astype(np.int16) - rough.astype(np.int16))
        rows.append(_beside([exact, rough, np.minimum(difference, 255).astype(np.uint8)], axis=1))
    Image.fromarray(_beside(rows, axis=0)).quantize(256).save(path, optimize=True)


def _beside(images: Sequence[Levels], axis: int) -> Levels:
    """Images beside each other, with white gaps."""
    shape = list(images[0].shape)
    shape[axis] = _GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([part for image in images for part in (gap, image)][1:], axis)
