"""A server's answers as values."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Image:
    """A finished image.

    Attributes:
        seed: the same request with this seed, for one image, gives the same bytes.
        png: 8 bits, grey or RGB. A text chunk holds its recipe: stepwise.read_recipe.
    """

    seed: int
    png: bytes = field(repr=False)

    def pil(self) -> "PIL.Image.Image":
        """The image for Pillow, which must be installed."""
        import PIL.Image

        with PIL.Image.open(io.BytesIO(self.png), formats=["PNG"]) as image:
            image.load()
            return image

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG unchanged."""
        Path(path).write_bytes(self.png)


@dataclass(frozen=True)
class Drawn:
    """The images of a request, and how they were made.

    Attributes:
        images: image i has the seed + i.
        parameters: the request, with its defaults filled in.
        timings: seconds: queue_s, denoise_s, encode_s, and decode_s with latent diffusion.
        model: name, digest and fingerprint.
        warnings: the server's, as sentences: that words of the prompt did not fit, for example.
    """

    images: tuple[Image, ...]
    parameters: Mapping[str, Any]
    timings: Mapping[str, float]
    model: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class DrawnArray:
    """Images as an exact array; with latent diffusion, their latents.

    Attributes:
        array: float32 in the model's own scale: [C, H, W] of one image, [N, C, H, W] of several.
        seed: of the first image.
        warnings: as in Drawn.
    """

    array: Float32
    seed: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One image, or all images of a request on a contact sheet, as a WebP or JPEG. It is lossy, and has no recipe.

    Attributes:
        seed: of the first image.
        warnings: as in Drawn.
    """

    content: bytes = field(repr=False)
    seed: int
    warnings: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file unchanged."""
        Path(path).write_bytes(self.content)


@dataclass(frozen=True)
class Noisy:
    """A noisy image as a PNG. A later upload needs the same `value_range`.

    Attributes:
        png: 16 bits, grey or RGB; its values 0 … 65535 stand for −value_range … value_range.
        seed: of the noise.
        clipped: the share of values that were out of this range.
    """

    png: bytes = field(repr=False)
    seed: int
    clipped: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG unchanged."""
        Path(path).write_bytes(self.png)


@dataclass(frozen=True, eq=False)
class NoisyArray:
    """An exact noisy image; with latent diffusion, noisy latents.

    Attributes:
        array: float32 [C, H, W] in the model's own scale.
        seed: of the noise.
    """

    array: Float32
    seed: int


# The events of a request, in order.


@dataclass(frozen=True)
class Queued:
    """The request is accepted. This event comes again after each break of the stream.

    Attributes:
        position: how many requests go first, as things stand.
        eta_s: the expected seconds until the request is done.
        promise_s: the seconds by which the request will be done, whatever arrives later.
        warnings: as in Drawn.
    """

    position: int
    eta_s: float
    promise_s: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        step, steps: steps that the slowest image has taken, of all its steps.
        eta_s: the expected seconds until the request is done.
        images_done, images: finished images, of all of them. None from servers that do not tell.
        fraction: the share of all work that is done, 0 to 1; from servers that do not tell, step / steps.
    """

    step: int
    steps: int
    eta_s: float
    images_done: int | None
    images: int | None
    fraction: float


@dataclass(frozen=True)
class Preview:
    """The expected result of an image.

    Attributes:
        index: of the image.
        step: the preview shows the expectation after this step.
        png: 8 bits, without a recipe.
        decoder: `linear` for a rough image of latents; None for an exact preview.
    """

    index: int
    step: int
    png: bytes = field(repr=False)
    decoder: str | None = None


@dataclass(frozen=True)
class ImageDone:
    """A finished image. Images come in the order of their completion."""

    index: int
    image: Image


@dataclass(frozen=True)
class Done:
    """The last event. `parameters` and `timings` are as in Drawn."""

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


class TextInfo(TypedDict):
    """The text encoders of a text-to-image model, and the limits of prompts.

    `force_zeros_for_empty_prompt`: whether a negative prompt of None and one of "" draw different images.
    """

    length: int
    layers: int
    num_parameters: int
    encoders: NotRequired[int]
    force_zeros_for_empty_prompt: NotRequired[bool]
    max_prompt_bytes: int
    max_prompt_tokens: int


class RecommendedInfo(TypedDict):
    """The model's defaults for requests."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    timesteps: NotRequired[list[int] | None]


class SizeInfo(TypedDict):
    """A size of images, in pixels, and what its passes and decodings cost."""

    width: int
    height: int
    seconds_per_step: dict[str, float]
    seconds_per_decode: dict[str, float] | None


class LimitsInfo(TypedDict):
    """The limits of requests."""

    max_images: int
    max_batch: int
    max_queue: int
    max_body: int
    timeout_s: float


class Info(TypedDict):
    """The model, its runtime, and the limits of requests.

    `sizes` has the default size first. `text` is None for a model without prompts. `embedded_fields` are the fields of
    a request that the network is told as numbers. `sigma_schedules` has those of each sampler that knows any.
    """

    version: str
    model: ModelInfo
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    num_train_timesteps: int
    image_shape: list[int]
    latent_shape: list[int] | None
    sizes: NotRequired[list[SizeInfo]]
    first_stage: FirstStageInfo | None
    preview: Literal["linear"] | None
    text: NotRequired[TextInfo | None]
    embedded_fields: NotRequired[list[str]]
    safety_checker: NotRequired[Literal["none", "not run"]]
    inpaints: NotRequired[bool]
    out_channels: int
    num_classes: int | None
    class_names: list[str] | None
    samplers: list[str]
    sigma_schedules: NotRequired[dict[str, list[str]]]
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
