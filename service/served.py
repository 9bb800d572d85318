"""What this server serves: the model, what computes it, and the fingerprint of both."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

import service
from model.description import ModelDescription
from model.rows import Image


@dataclass(frozen=True)
class Served:
    """Facts that never change while the server runs.

    Attributes:
        model: the loaded weights.
        device: what computes, such as cpu or cuda:0.
        fingerprint_parts: all that can move a bit of an answer, by name.
        reproducible: whether a row's bytes were seen not to depend on other rows.
        first_draw: the noise that an image of a seed and shape starts from.
        preview: of latent diffusion, makes a rough image, [C, H, W], of latents; None where rows are images.
    """

    model: ModelDescription
    device: str
    fingerprint_parts: Mapping[str, str | int]
    reproducible: bool
    first_draw: Callable[[int, tuple[int, int, int]], Image]
    preview: Callable[[Image], Image] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits. Two runtimes whose bytes differ never share one."""
        parts = json.dumps(dict(self.fingerprint_parts), sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


def fingerprint_parts(
    model: ModelDescription, backend: Mapping[str, str | int], noise_version: str
) -> dict[str, str | int]:
    """All that can move a bit: the weights, the backend's own parts, and what draws noise, tables and images."""
    return {
        "stepwise": service.__version__,
        "weights": model.digest,
        **backend,
        "torch": noise_version,
        "numpy": np.__version__,
        "image_encoder": f"OpenCV {cv2.__version__}",
    }
