"""The served model, its runtime, and the fingerprint of both."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np

import service
from model.description import ModelDescription, Recommended
from model.rows import Group, Image, Tokenize

# Raise this number with every change of our own code that changes a bit of any image, or of the text in it: networks,
# schedules, samplers, noise, colours, recipes. tests/test_arithmetic.py has the sums for each number.
# 1: recipes named the model by its folder. 2: recipes use the name in the model's config. 3: the embedding of each
# timestep is computed alone. 4: images say in XMP that a model made them; samplers remember up to three predictions.
ARITHMETIC = 4


@dataclass(frozen=True)
class Served:
    """Facts that never change while the server runs.

    Attributes:
        model: the loaded weights.
        device: the computing device, such as cpu or cuda:0.
        fingerprint_parts: all that can change a bit of an answer, by name.
        reproducible: a check has found that a row's bytes do not depend on other rows.
        first_draw: gives the initial noise of an image for a seed and a shape.
        groups: the sizes of images that are served. The first is the default.
        preview: makes a rough image, [C, H, W], from latents; None where rows are images.
        tokenize: the tokens of a prompt; None for a model without text. Any thread may call this.
        recipe_prompts: whether recipes have prompts. Otherwise they have the prompts' hashes.
        checks_images: whether an operator's check sees each image. Then clients get no latents and no unfinished image.
    """

    model: ModelDescription
    device: str
    fingerprint_parts: Mapping[str, str | int]
    reproducible: bool
    first_draw: Callable[[int, tuple[int, int, int]], Image]
    groups: tuple[Group, ...]
    preview: Callable[[Image], Image] | None = None
    tokenize: Tokenize | None = None
    recipe_prompts: bool = True
    checks_images: bool = False

    @property
    def draws_pictures(self) -> bool:
        """Whether images are grey or RGB. Others, such as spectra, are answered and read as .npy alone."""
        return self.model.image_shape[0] in (1, 3)

    def shown(self, preview: Image) -> Image:
        """A preview of a row as an image, [C, H, W]: rough, if the preview is latents."""
        return preview if self.preview is None else self.preview(preview)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits. Two runtimes with different bytes never share a fingerprint."""
        parts = json.dumps(dict(self.fingerprint_parts), sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


def fingerprint_parts(
    model: ModelDescription,
    default: Group,
    backend: Mapping[str, str | int],
    host: Mapping[str, str],
    image_encoder: str,
    recommended: Recommended | None = None,
    recipe_prompts: bool = True,
) -> dict[str, str | int]:
    """All that can change a bit, by name: our own code, the weights, the backend, and the libraries around it.

    Args:
        default: the size of requests that name none.
        backend: the parts of the backend.
        host: the parts that draw noise and make step tables, with every backend.
        image_encoder: the part that writes PNG, WebP and JPEG.
        recommended: the defaults of requests, if a setting has replaced those of the weights.
        recipe_prompts: whether recipes have prompts.
    """
    return {
        "arithmetic": ARITHMETIC,
        "stepwise": service.__version__,
        "model": model.recipe_name,
        "weights": model.digest,
        **({} if default == model.group else {"size": str(default)}),
        **({} if recommended is None else {"recommended": _in_words(recommended)}),
        **({} if recipe_prompts or model.text is None else {"recipe_prompts": 0}),
        **backend,
        **host,
        "numpy": " ".join([np.__version__, *_numpy_instructions()]),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "image_encoder": image_encoder,
    }


def _in_words(recommended: Recommended) -> str:
    return " ".join(str(value) for value in astuple(recommended) if value is not None)


def _numpy_instructions() -> list[str]:
    """The instruction sets beyond the baseline that NumPy uses on this machine."""
    found: list[str] = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return found
