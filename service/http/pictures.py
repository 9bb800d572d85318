"""Files that are sent to /sample → the picture that rows begin from: decoded, fitted to a served size, and hashed."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.Image import Image as PillowImage
from PIL.Image import Resampling

from model.rows import Group
from service.errors import Invalid
from service.http.photos import MAX_PIXELS, Mode, Photo, read_photo
from service.http.pieces import PIECE, Bytes, rest
from service.plan import sizes
from service.plan.fields import Fit, SampleRequest
from service.plan.pictures import Picture
from service.plan.served import Served

_HALF = 128  # of 255; as diffusers, which asks for 0.5 of 1


def where_white(mask: Photo) -> PillowImage:
    """The part that a mask of /sample names.

    Raises:
        Invalid: the mask is white only because it is transparent.
    """
    if mask.alpha is not None and _is_white(mask.pixels):
        raise Invalid.field("mask_image", "is white everywhere, for its transparent parts are laid over white")
    return mask.pixels


def where_transparent(mask: Photo) -> PillowImage:
    """The part that a mask of OpenAI's API names.

    Raises:
        Invalid: nothing is transparent.
    """
    if mask.alpha is None or _is_white(mask.alpha):
        raise Invalid.field("mask", "has no transparent parts, and these are what is drawn anew")
    return ImageOps.invert(mask.alpha)


class Attached(NamedTuple):
    """Files of a request, and its fields, which say how the files are fitted.

    Attributes:
        part: the part that a mask names, in grey: white is drawn anew.
        is_cut_out: without a mask, the image's own transparent parts are drawn anew.
        names: of image and mask, for errors.
    """

    fields: SampleRequest
    image: Bytes | None = None
    mask: Bytes | None = None
    part: Callable[[Photo], PillowImage] = where_white
    is_cut_out: bool = False
    names: tuple[str, str] = ("image", "mask_image")


def picture_of(attached: Attached, served: Served) -> Picture:
    """The picture of a request. This takes long: see `read_photo`.

    Raises:
        Invalid: a file cannot be read, the model draws no pictures, no served size has what the request names, or there
            is a mask alone.
    """
    request = attached.fields
    if attached.image is None:
        raise Invalid.field("mask_image", "needs an image: it says which part of `image` is drawn anew")
    channels = served.model.image_shape[0]
    if not served.draws_pictures:
        raise Invalid.field(
            "image", f"must be left out: images of this model have {channels} channels, and are no pictures"
        )
    mode: Mode = "L" if channels == 1 else "RGB"
    image_name, mask_name = attached.names
    photo, alpha = read_photo(attached.image, mode, image_name)
    group = sizes.asked(request, served.groups, Group(photo.height, photo.width))
    picture = Picture(image_of(fitted(photo, group, request.fit)), digest(photo))
    del photo
    if attached.mask is not None:
        part = attached.part(read_photo(attached.mask, "L", mask_name))
    elif attached.is_cut_out and alpha is not None:
        part = ImageOps.invert(alpha)
    else:
        return picture
    is_new = fitted(part, group, request.fit) >= _HALF
    if attached.mask is None and not is_new.any():
        return picture
    return Picture(picture.image, picture.image_sha256, is_new, digest(part))


def _is_white(grey: PillowImage) -> bool:
    return not any(grey.histogram()[:_HALF])


def fitted(photo: PillowImage, group: Group, fit: Fit) -> NDArray[np.uint8]:
    """The photo at another size, by Lanczos' filter, [H, W] of grey and [H, W, 3] of RGB.

    To stretch is what diffusers' pipelines do. To crop is what their VaeImageProcessor calls `crop`: the photo is
    scaled to cover the size, and what is too much on two sides is cut off.
    """
    if fit == "stretch":
        return np.asarray(photo.resize((group.width, group.height), Resampling.LANCZOS))
    is_narrow = group.width * photo.height > photo.width * group.height
    width = group.width if is_narrow else photo.width * group.height // photo.height  # scaled
    height = group.height if not is_narrow else photo.height * group.width // photo.width
    left, top = width // 2 - group.width // 2, height // 2 - group.height // 2
    right, bottom = left + group.width, top + group.height
    if width * height <= MAX_PIXELS:
        return np.asarray(photo.resize((width, height), Resampling.LANCZOS).crop((left, top, right, bottom)))
    # A very long photo is not scaled as a whole. Pillow may then go over lines and columns in another order.
    x, y = photo.width / width, photo.height / height
    box = (left * x, top * y, right * x, bottom * y)
    return np.asarray(photo.resize((group.width, group.height), Resampling.LANCZOS, box))


def image_of(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """0 … 255 → −1 … 1, float32 [C, H, W], with the arithmetic of diffusers."""
    values = np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(np.float32(2) * values - np.float32(1))


def digest(photo: PillowImage) -> str:
    """SHA-256 of a photo before it is fitted: `RGB WIDTHxHEIGHT` or `L WIDTHxHEIGHT`, a line feed, then its values.

    The values are 8 bits each, pixel by pixel and line by line. So a picture has one digest, however it was sent.
    """
    known = hashlib.sha256(f"{photo.mode} {photo.width}x{photo.height}\n".encode())
    lines = max(1, PIECE // photo.width)
    for top in range(0, photo.height, lines):
        rest()
        known.update(photo.crop((0, top, photo.width, min(photo.height, top + lines))).tobytes())
    return known.hexdigest()
