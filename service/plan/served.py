"""What this server serves: the model, what computes it, and the fingerprint of both."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import service
from model.description import ModelDescription
from model.rows import Image

# Raise it with every change of our own code that moves a bit of any image, or of the text in it: networks, schedules,
# samplers, noise, colours, recipes. tests/test_arithmetic.py knows the sums of each number.
# 1: recipes named the model as its folder. 2: they name it as its config does.
ARITHMETIC = 2


@dataclass(frozen=True)
class Served:
    """Facts that never change while the server runs.

    Attributes:
        model: the loaded weights.
        device: what computes, such as cpu or cuda:0.
        fingerprint_parts: all that can move a bit of an answer, by name.
        reproducible: whether a row's bytes were seen not to depend on other rows.
        first_draw: the noise that an image of a seed and shape starts from.
        preview: makes a rough image, [C, H, W], of latents; None where rows are images.
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
    model: ModelDescription, backend: Mapping[str, str | int], host: Mapping[str, str], image_encoder: str
) -> dict[str, str | int]:
    """All that can move a bit, by name: our own code, the weights, what computes, and what draws and writes images.

    Args:
        backend: the parts of what computes.
        host: what draws noise and makes step tables on every backend.
        image_encoder: what writes PNGs.
    """
    return {
        "arithmetic": ARITHMETIC,
        "stepwise": service.__version__,
        "model": model.recipe_name,
        "weights": model.digest,
        **backend,
        **host,
        "numpy": " ".join([np.__version__, *_numpy_instructions()]),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "image_encoder": image_encoder,
    }


def _numpy_instructions() -> list[str]:
    """The sets of instructions beyond the baseline that NumPy uses here."""
    found: list[str] = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return found
