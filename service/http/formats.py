"""Arrays → WebP, JPEG, .npy and contact sheets. PNG is png.py's.

Arrays are float32 [C, H, W]; −1 … 1 is the range of a clean image.
"""

import hashlib
import io
import math
from collections.abc import Sequence

import cv2
import numpy as np
import PIL
from PIL import Image as PillowImage
from PIL import features

from model.rows import Image
from service.http.marks import XMP
from service.http.png import encode_png, to_uint8

QUALITY = 95
MOST_SIDE = {"WEBP": 16383, "JPEG": 65535}  # pixels of the longer side


def grid(count: int) -> tuple[int, int]:
    """The columns and rows of a contact sheet."""
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)


def contact_sheet(images: Sequence[Image]) -> Image:
    """Lay images out row by row in ceil(√n) columns, without gaps. Empty places are black."""
    channels, height, width = images[0].shape
    columns, rows = grid(len(images))
    sheet = np.full((channels, rows * height, columns * width), -1, dtype=np.float32)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return sheet


def encode_lossy(x: Image, kind: str, quality: int = QUALITY) -> bytes:
    """A WebP or a JPEG, by Pillow's name of the format; grey or RGB, without a recipe, with the mark in XMP.

    Args:
        quality: 0 to 100.
    """
    pixels = to_uint8(x)
    file = io.BytesIO()
    picture = PillowImage.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.save(file, kind, quality=quality, xmp=XMP)
    return file.getvalue()


def encode_npy(x: Image) -> bytes:
    """A .npy file of float32, [C, H, W] or [N, C, H, W]."""
    file = io.BytesIO()
    np.save(file, x.astype(np.float32, copy=False), allow_pickle=False)
    return file.getvalue()


def image_encoder() -> str:
    """All that decides the bytes of a PNG, a WebP or a JPEG: the libraries' versions, and digests of a sample.

    OpenCV compresses PNGs with the system's zlib. Its versions and forks pack differently.
    """
    y, x = np.mgrid[0:128, 0:128]
    pattern = np.stack([x * y % 251, (x + y) % 256, (x * x + y * 7) % 13 * 19])  # larger than zlib's window of 32 KiB
    image = (pattern / 127.5 - 1).astype(np.float32)
    png, lossy = encode_png(image, {}), b"".join(encode_lossy(image, kind) for kind in MOST_SIDE)
    libraries = f"libwebp {features.version('webp')}, libjpeg {features.version('jpg')}"
    return f"OpenCV {cv2.__version__}, {_digest(png)}; Pillow {PIL.__version__}, {libraries}, {_digest(lossy)}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
