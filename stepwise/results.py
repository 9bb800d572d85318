"""What a server answers, as values."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Image:
    """An image that is done.

    Attributes:
        seed: alone it makes the same bytes again, of the same request.
        png: 8 bits, grey or RGB, with its recipe in a text chunk: stepwise.read_recipe.
    """

    seed: int
    png: bytes = field(repr=False)

    def pil(self) -> "PIL.Image.Image":
        """For Pillow, which must be installed."""
        import PIL.Image

        with PIL.Image.open(io.BytesIO(self.png), formats=["PNG"]) as image:
            image.load()
            return image

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG as it came."""
        Path(path).write_bytes(self.png)


@dataclass(frozen=True)
class Drawn:
    """Images, and what was done for them.

    Attributes:
        images: image i has the seed + i.
        parameters: the request, with its defaults filled in.
        timings: seconds: queue_s, denoise_s, encode_s, and decode_s of latent diffusion.
        model: name, digest and fingerprint.
    """

    images: tuple[Image, ...]
    parameters: Mapping[str, Any]
    timings: Mapping[str, float]
    model: Mapping[str, str]


@dataclass(frozen=True)
class Noisy:
    """A noisy image to look at, and to upload again with the same `value_range`.

    Attributes:
        png: 16 bits, grey or RGB; its values 0 … 65535 stand for −value_range … value_range.
        seed: of its noise.
        clipped: the share of its values that were out of that range.
    """

    png: bytes = field(repr=False)
    seed: int
    clipped: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG as it came."""
        Path(path).write_bytes(self.png)


@dataclass(frozen=True, eq=False)
class NoisyArray:
    """A noisy image, exact; of latent diffusion, noisy latents.

    Attributes:
        array: float32 [C, H, W] in the model's own scale.
        seed: of its noise.
    """

    array: Float32
    seed: int


# What happens to a request, one after the other.


@dataclass(frozen=True)
class Queued:
    """It is accepted. Comes again where the stream broke and was asked for again.

    Attributes:
        position: requests that are to go first, as things stand.
        eta_s: expected seconds until all is there.
        promise_s: seconds until it will be, whatever arrives later.
    """

    position: int
    eta_s: float
    promise_s: float


@dataclass(frozen=True)
class Progress:
    """Steps taken by the slowest image, and the expected seconds that are left."""

    step: int
    steps: int
    eta_s: float


@dataclass(frozen=True)
class Preview:
    """What an image is expected to become.

    Attributes:
        index: of the image.
        step: after which it is expected.
        png: 8 bits, without a recipe.
        decoder: `linear` for a rough image of latents; None where it is exact.
    """

    index: int
    step: int
    png: bytes = field(repr=False)
    decoder: str | None = None


@dataclass(frozen=True)
class ImageDone:
    """An image, as soon as it is there; not in the order of their indices."""

    index: int
    image: Image


@dataclass(frozen=True)
class Done:
    """The last event. `parameters` and `timings` are those of Drawn."""

    parameters: Mapping[str, Any]
    timings: Mapping[str, float]


Event = Queued | Progress | Preview | ImageDone | Done


# GET /info.


class ModelInfo(TypedDict):
    """The loaded weights."""

    name: str
    digest: str
    architecture: str
    num_parameters: int


class FirstStageInfo(TypedDict):
    """The autoencoder of latent diffusion."""

    kind: str
    factor: int
    scaling_factor: float
    num_parameters: int


class RecommendedInfo(TypedDict):
    """What a request that names nothing else gets."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float


class LimitsInfo(TypedDict):
    """What a request may ask for."""

    max_images: int
    max_batch: int
    max_queue: int
    max_body: int
    timeout_s: float


class Info(TypedDict):
    """The model, what computes it, and what a request may ask for."""

    version: str
    model: ModelInfo
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    num_train_timesteps: int
    image_shape: list[int]
    latent_shape: list[int] | None
    first_stage: FirstStageInfo | None
    preview: Literal["linear"] | None
    out_channels: int
    num_classes: int | None
    class_names: list[str] | None
    samplers: list[str]
    num_inference_steps: list[int] | None
    recommended: RecommendedInfo
    limits: LimitsInfo
    device: str
    backend: str
    precision: str
    fingerprint: str
    fingerprint_parts: dict[str, str | int]
    reproducible: bool
    seconds_per_step: dict[str, float]
    seconds_per_decode: dict[str, float] | None
