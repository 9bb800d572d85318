"""Arrays ↔ PNG and .npy. Uploads are checked before they are decoded.

Arrays are float32 [C, H, W]; −1 … 1 is the range of a clean image.
"""

import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from model.rows import Image
from service.errors import Invalid
from service.http.pieces import rest

UInt8 = NDArray[np.uint8]
Bytes = bytes | bytearray

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER_ENDS = 33  # bytes of the magic and the chunk IHDR
_NPY_MAGIC = b"\x93NUMPY"
_CHUNKS = 1024  # the most chunks of a PNG, besides its pixel chunks
_CHUNKS_AT_ONCE = 128  # reading these takes less than half a millisecond
_PACKED = 2**16  # the most bytes of compressed pixels, besides twice the raw pixels
_LEAST_CHUNK = 1024  # the least mean of pixel bytes in a chunk; libpng writes 8192
_NPY_HEADER = 2**12 + 12  # the most bytes of an .npy before its values; numpy writes 128
_CHANNELS_OF_COLOUR_TYPE = {0: 1, 2: 3, 4: 2, 6: 4}  # grey, RGB, and both with alpha; 3 is a palette


def to_uint8(x: Image) -> UInt8:
    """Map [C, H, W] from −1 … 1 to 0 … 255, [H, W, C]. Rounds to the nearest, as diffusers does."""
    scaled = (x / 2 + 0.5).clip(0, 1).transpose(1, 2, 0) * 255
    return scaled.round().astype(np.uint8)


def contact_sheet(images: Sequence[Image]) -> Image:
    """Lay images out row by row in ceil(√n) columns, without gaps. Empty places are black."""
    channels, height, width = images[0].shape
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = np.full((channels, rows * height, columns * width), -1, dtype=np.float32)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return sheet


def encode_png(x: Image, parameters: Mapping[str, object]) -> bytes:
    """An 8-bit PNG, grey or RGB. The text chunk `parameters` holds its recipe."""
    bare = _png_of(to_uint8(x))
    recipe = b"parameters\0" + json.dumps(parameters, sort_keys=True).encode()
    return bare[:_HEADER_ENDS] + _chunk(b"tEXt", recipe) + bare[_HEADER_ENDS:]


def _png_of(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """A PNG of [H, W, C]. OpenCV takes a fifth of Pillow's time."""
    _, png = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, ::-1]))  # OpenCV's order is BGR
    return png.tobytes()


class DeepPng(NamedTuple):
    """A 16-bit PNG, and the share of clipped values."""

    png: bytes
    clipped: float


def image_encoder() -> str:
    """All that decides the bytes of a PNG: OpenCV's version, and the digest of a sample PNG.

    OpenCV compresses with the system's zlib. Its versions and forks pack differently.
    """
    y, x = np.mgrid[0:128, 0:128]
    pattern = np.stack([x * y % 251, (x + y) % 256, (x * x + y * 7) % 13 * 19])  # larger than zlib's window of 32 KiB
    png = encode_png((pattern / 127.5 - 1).astype(np.float32), {})
    return f"OpenCV {cv2.__version__}, {hashlib.sha256(png).hexdigest()[:16]}"


def encode_png16(x: Image, value_range: float) -> DeepPng:
    """A 16-bit PNG, grey or RGB. Its values 0 … 65535 stand for −value_range … value_range."""
    clipped = float(np.mean(np.abs(x) > value_range))
    scaled = (x.astype(np.float64) / (2 * value_range) + 0.5).clip(0, 1).transpose(1, 2, 0) * 65535
    return DeepPng(_png_of(scaled.round().astype(np.uint16)), clipped)


def encode_npy(x: Image) -> bytes:
    """A .npy file of float32 [C, H, W]."""
    file = io.BytesIO()
    np.save(file, x.astype(np.float32, copy=False), allow_pickle=False)
    return file.getvalue()


def is_png(data: Bytes) -> bool:
    """Whether an upload begins as a PNG does."""
    return data.startswith(_PNG_MAGIC)


def is_image(data: Bytes) -> bool:
    """Whether an upload begins as a PNG or an .npy file does."""
    return data.startswith((_PNG_MAGIC, _NPY_MAGIC))


def most_bytes(shape: tuple[int, int, int], latent_shape: tuple[int, int, int] | None = None) -> int:
    """The most bytes of an image file, [C, H, W]: twice its values, and 1 MiB for texts and profiles."""
    _, height, width = shape
    deepest = height * (1 + 8 * width)  # a 16-bit RGBA PNG
    return 2**20 + 2 * max(deepest, 4 * math.prod(latent_shape or shape))


def decode(
    data: Bytes, shape: tuple[int, int, int], value_range: float, latent_shape: tuple[int, int, int] | None = None
) -> Image:
    """Read an uploaded PNG or .npy as float32 of `shape`, [C, H, W].

    A PNG's values 0 … max stand for −value_range … value_range. For RGB models, grey becomes RGB. For grey models, RGB
    with equal channels becomes grey. Opaque alpha is dropped. An .npy has the model's own scale. For models of latents,
    an .npy holds latents of `latent_shape`.

    Raises:
        Invalid: says what the upload must be, and what it is.
    """
    if is_png(data):
        return _decode_png(data, shape, value_range)
    if data.startswith(_NPY_MAGIC):
        return _decode_npy(data, shape) if latent_shape is None else _decode_npy(data, latent_shape, "latents ")
    raise _invalid("must be a PNG or an .npy file, and is neither" if data else "is empty")


def _decode_png(data: Bytes, shape: tuple[int, int, int], value_range: float) -> Image:
    channels, height, width = shape
    if len(data) < _HEADER_ENDS or data[8:16] != b"\0\0\0\x0dIHDR":
        raise _invalid("is a PNG without a header")
    came_width, came_height, depth, colour_type = struct.unpack(">IIBB", data[16:26])
    if (came_width, came_height) != (width, height):
        raise _invalid(f"must be {width}x{height} pixels (width x height), and is {came_width}x{came_height}")
    if depth not in (8, 16) or colour_type not in _CHANNELS_OF_COLOUR_TYPE:
        kind = "a palette" if colour_type == 3 else f"{depth}-bit values"
        raise _invalid(f"must be grey or RGB with 8 or 16 bits a channel, and has {kind}")
    bare = _bare_png(data)
    try:
        with PillowImage.open(io.BytesIO(bare), formats=["PNG"]) as png:
            pixels = np.asarray(png)
    except (OSError, SyntaxError, ValueError):
        raise _invalid("is a PNG whose pixels cannot be read") from None
    if depth == 16 and colour_type != 0:
        # Pillow has checked the file. With several channels, Pillow keeps only 8 of 16 bits.
        deep = cv2.imdecode(np.frombuffer(bare, np.uint8), cv2.IMREAD_UNCHANGED)
        if deep is None or deep.dtype != np.uint16:
            raise _invalid("is a PNG whose pixels cannot be read")
        pixels = deep[:, :, [2, 1, 0, 3][: deep.shape[2]]]
    values = pixels[:, :, None] if pixels.ndim == 2 else pixels
    largest = 2**depth - 1
    if values.shape[2] in (2, 4):
        if (values[:, :, -1] != largest).any():
            raise _invalid("must be opaque, and has transparent pixels")
        values = values[:, :, :-1]
    values = _with_channels(values, channels)
    scaled = (values.astype(np.float64) / largest * 2 - 1) * value_range
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)


def _bare_png(data: Bytes) -> bytes:
    """The PNG with only its header and its pixels. Decoders then see no second header, profile, text or animation.

    The result has one pixel chunk, because Pillow reads chunks in a Python loop.

    Raises:
        Invalid: the file is cut short or damaged, or has a transparent colour or very many chunks.
    """
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    values = height * width * _CHANNELS_OF_COLOUR_TYPE[colour_type] * depth // 8
    most = _CHUNKS + values // _LEAST_CHUNK
    whole, pixels = memoryview(data), []
    begin, name, count = len(_PNG_MAGIC), b"", 0
    while name != b"IEND":
        count += 1
        if count > most:
            raise _invalid(f"is a PNG of more than {most} chunks")
        if count % _CHUNKS_AT_ONCE == 0:
            rest()
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        if end > len(data):
            raise _invalid("is a PNG that is cut short")
        name = bytes(data[begin + 4 : begin + 8])
        if zlib.crc32(whole[begin + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise _invalid("is a PNG that is damaged")
        if name == b"tRNS":
            raise _invalid("must be opaque, and has a transparent colour")
        if name == b"IDAT":
            pixels.append(whole[begin + 8 : end - 4])
        begin = end
    least = values + (0 if interlaced else height)  # one more byte for each line of pixels names its filter
    size, most_packed = sum(map(len, pixels)), _PACKED + 2 * least
    if size > most_packed:
        raise _invalid(f"is a PNG with {size} bytes of compressed pixels, and may have at most {most_packed}")
    packed = b"".join(pixels)
    try:
        complete = len(zlib.decompressobj().decompress(packed, least)) == least
    except zlib.error:
        complete = False
    if not complete:  # Pillow would paint missing lines of pixels black
        raise _invalid("is a PNG whose pixels cannot be read")
    return bytes(data[:_HEADER_ENDS]) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(name: bytes, content: Bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(name))
    return b"".join((struct.pack(">I", len(content)), name, content, struct.pack(">I", checksum)))


def _with_channels(values: NDArray[np.generic], channels: int) -> NDArray[np.generic]:
    """Widen grey to RGB, or narrow RGB with equal channels to grey, [H, W, channels]."""
    if channels == 3 and values.shape[2] == 1:
        return values.repeat(3, axis=2)
    if channels == 1 and values.shape[2] == 3:
        if (values != values[:, :, :1]).any():
            raise _invalid("must be grey, and has colours")
        return values[:, :, :1]
    return values


def _decode_npy(data: Bytes, shape: tuple[int, int, int], what: str = "") -> Image:
    file = io.BytesIO(data[:_NPY_HEADER])
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        came, fortran_order, dtype = read_header(file)
        kind = f"{dtype} {list(came)}"[:100]
    except Exception:  # NumPy parses the header as Python, which can fail in any way
        raise _invalid("is an .npy file whose header cannot be read") from None
    if dtype.hasobject:
        raise _invalid("must be an .npy of float32, and holds pickled objects, which are never opened")
    if dtype.newbyteorder("=") != np.float32 or came != shape:
        raise _invalid(f"must be an .npy of float32 {what}{list(shape)}, and is {kind}")
    size = len(data) - file.tell()
    expected = math.prod(shape) * 4
    if size != expected:
        raise _invalid(f"must be an .npy with {expected} bytes of values, and has {size}")
    values = (
        np.frombuffer(data, dtype, offset=file.tell())
        .reshape(shape, order="F" if fortran_order else "C")
        .astype(np.float32)
    )
    if not np.isfinite(values).all():
        raise _invalid("must have finite values, and has NaN or infinity")
    return values


def _invalid(problem: str) -> Invalid:
    return Invalid.field("image", problem)
