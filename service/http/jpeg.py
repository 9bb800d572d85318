"""What of a JPEG is decoded. A JPEG is checked before a decoder sees it."""

import struct
from typing import NamedTuple

from service.errors import Invalid
from service.http.pieces import Bytes, rest

_MAGIC = b"\xff\xd8\xff"
_SEGMENTS = 1024  # the most before the pixels; Pillow reads each in a Python loop
_SEGMENTS_AT_ONCE = 128
_SCANS = 256  # the most; encoders write about ten. A decoder visits all pixels for each, however short a scan is

_MOST_FILL = 64  # bytes before a marker
_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 …: the size of the image
_EXIF = 0xE1
_DROPPED = {0xFE, *range(0xE1, 0xF0)} - {0xEE}  # comments, profiles, texts and other images; Adobe's tells the colours


class BareJpeg(NamedTuple):
    """A JPEG with only what its pixels need.

    Attributes:
        exif: its metadata, which say how the camera was held; empty without any.
    """

    jpeg: bytes
    width: int
    height: int
    exif: bytes


def is_jpeg(data: Bytes) -> bool:
    """Whether an upload begins as a JPEG does."""
    return data.startswith(_MAGIC)


def bare_jpeg(data: Bytes, name: str) -> BareJpeg:
    """The JPEG without its profiles, texts and further images.

    Args:
        name: the field that the JPEG was sent as.

    Raises:
        Invalid: the file is cut short or damaged, or has very many segments or scans.
    """
    kept, sizes, exif = [bytes(data[:2])], set[tuple[int, int]](), b""
    place = 2
    for count in range(_SEGMENTS):
        if count % _SEGMENTS_AT_ONCE == 0:
            rest()
        place += _fill(data, place)
        marker, length = _segment(data, place, name)
        if marker == _SCAN:
            break
        content = bytes(data[place + 4 : place + 2 + length])
        if marker in _FRAMES:
            sizes.add(_size(content, name))
        if marker == _EXIF and content.startswith(b"Exif\0") and not exif:
            exif = content
        if marker not in _DROPPED:
            kept.append(bytes(data[place : place + 2 + length]))
        place += 2 + length
    else:
        raise Invalid.field(name, f"is a JPEG of more than {_SEGMENTS} segments")
    if len(sizes) != 1:
        raise Invalid.field(name, f"is a JPEG that tells {len(sizes)} sizes")
    if data.count(b"\xff\xda", place) > _SCANS:
        raise Invalid.field(name, f"is a JPEG of more than {_SCANS} scans")
    [(width, height)] = sizes
    return BareJpeg(b"".join([*kept, data[place:]]), width, height, exif)


def _fill(data: Bytes, place: int) -> int:
    """How many bytes may fill the gap before a marker: 0xFF, each. T.81, B.1.1.2."""
    gap = bytes(data[place : place + _MOST_FILL])
    return max(0, len(gap) - len(gap.lstrip(b"\xff")) - 1)


def _segment(data: Bytes, place: int, name: str) -> tuple[int, int]:
    """The marker of a segment, and the length of what follows the marker."""
    if place + 4 > len(data):
        raise Invalid.field(name, "is a JPEG that is cut short")
    begin, marker, length = struct.unpack_from(">BBH", data, place)
    if begin != 0xFF or length < 2:
        raise Invalid.field(name, "is a JPEG that is damaged")
    if place + 2 + length > len(data):
        raise Invalid.field(name, "is a JPEG that is cut short")
    return marker, length


def _size(frame: bytes, name: str) -> tuple[int, int]:
    """Width and height."""
    if len(frame) < 5:
        raise Invalid.field(name, "is a JPEG that is damaged")
    height, width = struct.unpack_from(">HH", frame, 1)
    return width, height
