"""Images that rows begin from, beside noise: what a request says of them, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model.description import ModelDescription
from model.rows import Group, Image, Moments, Source
from service.errors import Invalid
from service.plan.fields import SampleRequest
from service.plan.served import Served

HASHES = ("image_sha256", "mask_sha256")  # of recipes

_STRENGTH, _STRENGTH_IN_A_MASK = 0.8, 1.0  # of requests that name none: those of diffusers' pipelines
INPAINTS = "this network draws a part of an image anew, and nothing else"
NOTHING: dict[str, object] = {"strength": None, "fit": None, "paste_original": None}
_SEAM = 8  # pixels


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a served size, and the mask beside it.

    Attributes:
        image: float32 [C, H, W], −1 … 1.
        image_sha256: of the picture as it was decoded, before it was fitted to this size.
        mask: bool [H, W]. True is drawn anew. None draws the whole image anew.
        mask_sha256: likewise; None without a mask.
    """

    image: Image
    image_sha256: str
    mask: NDArray[np.bool_] | None = None
    mask_sha256: str | None = None

    @property
    def group(self) -> Group:
        """The size."""
        return Group(*self.image.shape[1:])


@dataclass(frozen=True, eq=False)
class Beginning:
    """What the rows of a request begin from beside noise. All of them share it.

    Attributes:
        strength: None without a picture.
        to_encode: what the VAE must encode first.
        source: makes the rows' source of what the encoder makes of `to_encode`; None without a picture.
        finish: see model.rows.Row.
        fields: of the request, with their defaults filled in; null without a picture.
        recipe: the fields and hashes of each image's recipe; null for what has no effect.
    """

    strength: float | None = None
    to_encode: Sequence[Image] = ()
    source: Callable[[Sequence[Moments]], Source] | None = None
    finish: Callable[[Image], Image] | None = None
    fields: dict[str, object] = field(default_factory=lambda: NOTHING)
    recipe: dict[str, object] = field(default_factory=lambda: NOTHING)


def beginning_of(request: SampleRequest, picture: Picture | None, served: Served, latent: bool) -> Beginning:
    """What the rows of a request begin from.

    Args:
        latent: the answer is latents, if the model denoises latents.

    Raises:
        Invalid: the request says something of an image that is not there, or the model cannot draw from it.
    """
    model = served.model
    if picture is None:
        if model.inpaints:
            raise Invalid.field("image", f"is required, with mask_image: {INPAINTS}")
        _check_nothing(request)
        return Beginning()
    mask = picture.mask
    if mask is None and model.inpaints:
        raise Invalid.field("mask_image", f"is required: {INPAINTS}")
    if request.paste_original:
        if mask is None:
            raise Invalid.field("paste_original", "must be false without a mask_image")
        if latent and model.vae is not None:
            raise Invalid.field("paste_original", "must be false where latents are answered")
    strength = request.strength
    if strength is None:
        strength = _STRENGTH if mask is None else _STRENGTH_IN_A_MASK
    to_encode, source = _sources(picture, strength, model)
    fields: dict[str, object] = {"strength": strength, "fit": request.fit, "paste_original": request.paste_original}
    return Beginning(
        strength,
        to_encode if model.vae is not None else (),
        source if model.vae is not None else lambda _: source([Moments(image) for image in to_encode]),
        Original(picture.image, mask).pasted if request.paste_original and mask is not None else None,
        fields,
        {
            **fields,
            "paste_original": request.paste_original or None,
            "image_sha256": picture.image_sha256,
            "mask_sha256": picture.mask_sha256,
        },
    )


def _check_nothing(request: SampleRequest) -> None:
    """Refuse fields that are for requests with an image."""
    for name, nothing, value in (
        ("strength", "null", request.strength),
        ("fit", "stretch", request.fit),
        ("paste_original", "false", request.paste_original or None),
    ):
        if value not in (None, nothing):
            raise Invalid.field(name, f"must be {nothing} without an image, and is {str(value).lower()}")


def _sources(
    picture: Picture, strength: float, model: ModelDescription
) -> tuple[Sequence[Image], Callable[[Sequence[Moments]], Source]]:
    """The images that are encoded for the rows' source, and what makes the source of them."""
    images, mask = {"image": picture.image}, picture.mask
    from_noise = mask is not None and strength == 1
    if model.inpaints:
        assert mask is not None
        images["masked"] = np.where(mask, np.float32(0), picture.image)
        if from_noise:
            del images["image"]
    factor = 1 if model.vae is None else model.vae.factor
    small = None if mask is None else mask[::factor, ::factor]  # as torch's nearest interpolation takes it

    def source(encoded: Sequence[Moments]) -> Source:
        return Source(mask=small, from_noise=from_noise, **dict(zip(images, encoded, strict=True)))

    return [*images.values()], source


class Original:
    """An image of which a mask keeps a part.

    Args:
        image: float32 [C, H, W].
        mask: bool [H, W]. True is drawn anew.
    """

    def __init__(self, image: Image, mask: NDArray[np.bool_]) -> None:
        self._image = image
        self._mask = mask

    @cached_property
    def _share(self) -> NDArray[np.float32]:
        """Not known before the first image, so that a request that waits holds little."""
        return _share_of_drawn(self._mask)

    def pasted(self, drawn: Image) -> Image:
        """The drawn image, [C, H, W], with what the mask keeps of the original.

        The original's values are exact outside of the mask. Inside, a seam of 8 pixels blends both.
        """
        image: Image = self._share * drawn
        image += (np.float32(1) - self._share) * self._image
        return image


def _share_of_drawn(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The drawn image's share of each pixel, [H, W]: 0 outside of the mask, and inside rising to 1 over the seam."""
    inside, depth = mask, mask.astype(np.uint8)
    for _ in range(_SEAM):
        # One pixel less at each side. Beyond the edges of the image nothing is kept.
        inside, before = inside.copy(), inside
        inside[1:] &= before[:-1]
        inside[:-1] &= before[1:]
        before = inside.copy()
        inside[:, 1:] &= before[:, :-1]
        inside[:, :-1] &= before[:, 1:]
        depth += inside
    share: NDArray[np.float32] = depth * np.float32(1 / (_SEAM + 1))
    share[inside] = 1
    return share
