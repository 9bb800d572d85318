"""Arrays ↔ PNG. An uploaded PNG is checked before it is decoded.

Arrays are float32 [C, H, W], with one channel (grey) or three (RGB); −1 … 1 is the range of a clean image.
"""

import io
import json
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from model.rows import Image
from service.errors import Invalid
from service.http.marks import PNG_ITXT
from service.http.pieces import Bytes, rest

UInt8 = NDArray[np.uint8]

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER_ENDS = 33  # bytes of the magic and the chunk IHDR
_CHUNKS = 1024  # the most chunks of a PNG, besides its pixel chunks
_CHUNKS_AT_ONCE = 128  # reading these takes less than half a millisecond
_UNPACKED_AT_ONCE = 2**24  # bytes of pixels
_PACKED = 2**16  # the most bytes of compressed pixels, besides twice the raw pixels
_LEAST_CHUNK = 1024  # the least mean of pixel bytes in a chunk; libpng writes 8192
_CHANNELS_OF_COLOUR_TYPE = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # grey, RGB, a palette, and the first two with alpha
_PALETTE = 3


def either(choices: Iterable[str]) -> str:
    """a, b or c."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def to_uint8(x: Image) -> UInt8:
    """Map [C, H, W] from −1 … 1 to 0 … 255, [H, W, C]. Rounds to the nearest, as diffusers does."""
    scaled = (x / 2 + 0.5).clip(0, 1).transpose(1, 2, 0) * 255
    return scaled.round().astype(np.uint8)


def encode_png(x: Image, parameters: Mapping[str, object]) -> bytes:
    """An 8-bit PNG, grey or RGB. The text chunk `parameters` holds its recipe, and XMP says that a model made it."""
    bare = _png_of(to_uint8(x))
    recipe = b"parameters\0" + json.dumps(parameters, sort_keys=True).encode()
    texts = _chunk(b"tEXt", recipe) + _chunk(b"iTXt", PNG_ITXT)
    return bare[:_HEADER_ENDS] + texts + bare[_HEADER_ENDS:]


def _png_of(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """A PNG of [H, W, C]. OpenCV takes a fifth of Pillow's time."""
    _, png = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, ::-1]))  # OpenCV's order is BGR
    return png.tobytes()


class DeepPng(NamedTuple):
    """A 16-bit PNG, and the share of clipped values."""

    png: bytes
    clipped: float


def encode_png16(x: Image, value_range: float) -> DeepPng:
    """A 16-bit PNG, grey or RGB. Its values 0 … 65535 stand for −value_range … value_range.

    It has no texts: it holds a client's own image, with noise.
    """
    clipped = float(np.mean(np.abs(x) > value_range))
    scaled = (x.astype(np.float64) / (2 * value_range) + 0.5).clip(0, 1).transpose(1, 2, 0) * 65535
    return DeepPng(_png_of(scaled.round().astype(np.uint16)), clipped)


def is_png(data: Bytes) -> bool:
    """Whether an upload begins as a PNG does."""
    return data.startswith(_PNG_MAGIC)


def read_png(data: Bytes, channels: int, sizes: Sequence[tuple[int, int]], value_range: float) -> Image:
    """Read an uploaded PNG as float32 [channels, H, W].

    Args:
        channels: 1 or 3.
        sizes: the (H, W) that it may have.
        value_range: its values 0 … max stand for −value_range … value_range.

    Raises:
        Invalid: says what the upload must be, and what it is.
    """
    header = header_of(data)
    if (header.height, header.width) not in sizes:
        allowed = either(f"{width}x{height}" for height, width in sizes)
        raise _invalid(f"must be {allowed} pixels (width x height), and is {header.width}x{header.height}")
    depth, colour_type = header.depth, header.colour_type
    if depth not in (8, 16) or colour_type == _PALETTE:
        kind = "a palette" if colour_type == _PALETTE else f"{depth}-bit values"
        raise _invalid(f"must be grey or RGB with 8 or 16 bits a channel, and has {kind}")
    bare = bare_png(data)
    if b"tRNS" in bare.names:
        raise _invalid("must be opaque, and has a transparent colour")
    try:
        with PillowImage.open(io.BytesIO(bare.png), formats=["PNG"]) as png:
            pixels = np.asarray(png)
    except (OSError, SyntaxError, ValueError):
        raise _invalid("is a PNG whose pixels cannot be read") from None
    if depth == 16 and colour_type != 0:
        # Pillow has checked the file. With several channels, Pillow keeps only 8 of 16 bits.
        deep = cv2.imdecode(np.frombuffer(bare.png, np.uint8), cv2.IMREAD_UNCHANGED)
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


class Header(NamedTuple):
    """What the chunk IHDR says.

    Attributes:
        depth: bits of a value.
    """

    width: int
    height: int
    depth: int
    colour_type: int
    is_interlaced: bool

    @property
    def raw_bytes(self) -> int:
        """The least bytes of the pixels. Interlacing may add some."""
        bits = self.width * _CHANNELS_OF_COLOUR_TYPE[self.colour_type] * self.depth
        if self.is_interlaced:
            return self.height * bits // 8
        return self.height * (1 + (bits + 7) // 8)  # one byte for each line of pixels names its filter


def header_of(data: Bytes, name: str = "image") -> Header:
    """The header of a PNG, sent as the field `name`. Raises Invalid if there is none."""
    if len(data) < _HEADER_ENDS or data[8:16] != b"\0\0\0\x0dIHDR":
        raise Invalid.field(name, "is a PNG without a header")
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if colour_type not in _CHANNELS_OF_COLOUR_TYPE:
        raise Invalid.field(name, f"is a PNG of colour type {colour_type}, which does not exist")
    return Header(width, height, depth, colour_type, bool(interlaced))


class Bare(NamedTuple):
    """A PNG without what nobody asked for.

    Attributes:
        names: of all chunks that the whole file had.
    """

    png: bytes
    names: frozenset[bytes]


def bare_png(data: Bytes, name: str = "image", kept: Collection[bytes] = ()) -> Bare:
    """The PNG with only its header, its pixels and the first chunk of each of the names `kept`.

    Decoders then see no second header, profile, text or animation. The result has one pixel chunk, because Pillow reads
    chunks in a Python loop.

    Args:
        name: the field that the PNG was sent as.

    Raises:
        Invalid: the file is cut short or damaged, or has very many chunks.
    """
    header = header_of(data, name)
    least = header.raw_bytes
    most = _CHUNKS + least // _LEAST_CHUNK
    whole, pixels, others = memoryview(data), [], dict[bytes, bytes]()
    names = set()
    begin, count = len(_PNG_MAGIC), 0
    while b"IEND" not in names:
        count += 1
        if count > most:
            raise Invalid.field(name, f"is a PNG of more than {most} chunks")
        if count % _CHUNKS_AT_ONCE == 0:
            rest()
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        if end > len(data):
            raise Invalid.field(name, "is a PNG that is cut short")
        chunk = bytes(data[begin + 4 : begin + 8])
        if zlib.crc32(whole[begin + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Invalid.field(name, "is a PNG that is damaged")
        if chunk == b"IDAT":
            pixels.append(whole[begin + 8 : end - 4])
        elif chunk in kept:
            others.setdefault(chunk, bytes(whole[begin:end]))
        names.add(chunk)
        begin = end
    size, most_packed = sum(map(len, pixels)), _PACKED + 2 * least
    if size > most_packed:
        raise Invalid.field(
            name, f"is a PNG with {size} bytes of compressed pixels, and may have at most {most_packed}"
        )
    packed = b"".join(pixels)
    if not _unpacks(packed, least):  # Pillow would paint missing lines of pixels black
        raise Invalid.field(name, "is a PNG whose pixels cannot be read")
    parts = [data[:_HEADER_ENDS], *others.values(), _chunk(b"IDAT", packed), _chunk(b"IEND", b"")]
    return Bare(b"".join(parts), frozenset(names))


def _unpacks(packed: bytes, least: int) -> bool:
    """Whether compressed pixels unpack to at least so many bytes. Only a piece of these is in memory at a time."""
    unpacker, count = zlib.decompressobj(), 0
    try:
        while count < least:
            piece = unpacker.decompress(packed, min(_UNPACKED_AT_ONCE, least - count))
            if not piece:
                return False
            count += len(piece)
            packed = unpacker.unconsumed_tail
    except zlib.error:
        return False
    return True


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


def _invalid(problem: str) -> Invalid:
    return Invalid.field("image", problem)
