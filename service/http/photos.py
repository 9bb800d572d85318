"""Reads images as people have them: PNG, JPEG and WebP of any size, mode and orientation. POST /sample takes these.

Whatever a file is, its picture has 8 bits a channel, is RGB or grey, opaque and upright:

- 16 bits: the upper 8 of each value count, as in Pillow.
- Palettes become colours; 1, 2 and 4 bits become 8.
- Transparent parts are laid over white.
- CMYK becomes RGB by the plain formula. Colour profiles are not applied, as in diffusers' pipelines.
- The first frame of an animation counts.
- EXIF turns and mirrors. EXIF that cannot be read does neither.

Sizes are checked before anything is decoded.
"""

import io
import struct
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image as PillowImage
from PIL.Image import Transpose

from service.errors import Invalid
from service.http.jpeg import bare_jpeg, is_jpeg
from service.http.pieces import Bytes
from service.http.png import bare_png, header_of, is_png

MAX_PIXELS = 3 * 2**24  # a phone of 50 megapixels has 8160x6144
MAX_SIDE = 2**16 - 1  # pixels; the most of a JPEG

Mode = Literal["RGB", "L"]

_WEBP_HEADER = 30  # bytes
_ORIENTATION = 0x0112  # the tag of EXIF
_MAX_TAGS = 4096
_SHORT = 3  # a type of EXIF's values: 16 bits
_TURNED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Photo(NamedTuple):
    """A decoded picture: 8 bits a channel, RGB or grey, opaque and upright.

    Attributes:
        alpha: grey, 255 is opaque: the transparent parts of the file, which are white in `pixels`. None without any.
    """

    pixels: PillowImage.Image
    alpha: PillowImage.Image | None


def is_photo(data: Bytes) -> bool:
    """Whether an upload begins as a PNG, a JPEG or a WebP does."""
    return is_png(data) or is_jpeg(data) or _is_webp(data)


def read_photo(data: Bytes, mode: Mode, name: str) -> Photo:
    """Decode a file. This may take seconds and 0.9 GB: call it in a thread, one at a time.

    Args:
        name: the field that the file was sent as.

    Raises:
        Invalid: says what is wrong with the file.
    """
    file = _checked(data, name)
    photo, exif = _decoded(file, mode, name)
    turned = _TURNED.get(orientation(file.exif or exif))
    if turned is None:
        return photo
    return Photo(photo.pixels.transpose(turned), None if photo.alpha is None else photo.alpha.transpose(turned))


class _File(NamedTuple):
    """A file whose size is checked, with Pillow's name for its format."""

    kind: str
    data: Bytes
    exif: bytes = b""


_NAMES = {"PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP"}


def _checked(data: Bytes, name: str) -> _File:
    if is_png(data):
        header = header_of(data, name)
        _check_size(header.width, header.height, name)
        return _File("PNG", bare_png(data, name, (b"PLTE", b"tRNS", b"eXIf")).png)
    if is_jpeg(data):
        bare = bare_jpeg(data, name)
        _check_size(bare.width, bare.height, name)
        return _File("JPEG", bare.jpeg, bare.exif)
    if _is_webp(data):
        _check_size(*_webp_size(data, name), name)
        return _File("WEBP", data)
    raise Invalid.field(name, "must be a PNG, JPEG or WebP file, and is " + ("none of these" if data else "empty"))


def _check_size(width: int, height: int, name: str) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise Invalid.field(
            name, f"must have at most {MAX_PIXELS} pixels, and {MAX_SIDE} a side, and is {width}x{height}"
        )


def _is_webp(data: Bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _webp_size(data: Bytes, name: str) -> tuple[int, int]:
    """Width and height. https://developers.google.com/speed/webp/docs/riff_container"""
    if len(data) < _WEBP_HEADER:
        raise Invalid.field(name, "is a WebP that is cut short")

    def number(begin: int, end: int) -> int:
        return int.from_bytes(data[begin:end], "little")

    match bytes(data[12:16]):
        case b"VP8X":
            return 1 + number(24, 27), 1 + number(27, 30)
        case b"VP8L":
            bits = number(21, 25)
            return 1 + bits % 2**14, 1 + (bits >> 14) % 2**14
        case b"VP8 ":
            return number(26, 28) % 2**14, number(28, 30) % 2**14
    raise Invalid.field(name, "is a WebP without a header")


def _decoded(file: _File, mode: Mode, name: str) -> tuple[Photo, bytes]:
    """The pixels of a file, not yet upright, and the EXIF that Pillow finds."""
    try:
        with PillowImage.open(io.BytesIO(file.data), formats=[file.kind]) as picture:
            _check_size(*picture.size, name)
            picture.load()
            return _plain(picture, mode), picture.info.get("exif", b"")
    except (Invalid, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise Invalid.field(name, f"is a {_NAMES[file.kind]} whose pixels cannot be read") from error


def _plain(picture: PillowImage.Image, mode: Mode) -> Photo:
    """Any mode → RGB or grey of 8 bits, opaque."""
    transparency = picture.info.get("transparency")  # of a palette, or one colour
    if picture.mode in ("I;16", "I"):
        picture = PillowImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if transparency is not None:
            picture.info["transparency"] = transparency >> 8
    alpha = None
    if transparency is not None or picture.mode in ("LA", "RGBA"):
        with_alpha = _of_mode(picture, "RGBA")
        channel = with_alpha.getchannel("A")
        picture = PillowImage.new("RGB", with_alpha.size, "white")
        picture.paste(with_alpha, mask=channel)
        alpha = channel if channel.getextrema() != (255, 255) else None
    return Photo(_of_mode(picture, mode), alpha)


def _of_mode(picture: PillowImage.Image, mode: str) -> PillowImage.Image:
    """The picture in this mode. Pillow would copy one that has it."""
    return picture if picture.mode == mode else picture.convert(mode)


def orientation(exif: bytes) -> int:
    """How EXIF turns the image: 1, which is upright, to 8. 1 if EXIF does not say it, or cannot be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        [begin] = struct.unpack_from(f"{order}I", tiff, 4)
        [count] = struct.unpack_from(f"{order}H", tiff, begin)
        for place in range(begin + 2, begin + 2 + 12 * min(count, _MAX_TAGS), 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
            if tag == _ORIENTATION:
                [value] = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", tiff, place + 8)
                return int(value) if value in _TURNED else 1
    except struct.error:
        pass  # the directory is cut short
    return 1
