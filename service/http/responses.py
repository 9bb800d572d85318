"""Turns finished images into answers: media type, bytes and headers."""

import base64
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from starlette.responses import JSONResponse, Response

from model.rows import Image
from service.engine.requests import Encoding, Finished
from service.errors import Invalid, NotAcceptable
from service.http.formats import MOST_SIDE, contact_sheet, encode_lossy, encode_npy, grid
from service.http.png import encode_png, encode_png16
from service.plan.plan import Plan
from service.plan.served import Served

PNG, WEBP, JPEG = "image/png", "image/webp", "image/jpeg"
JSON, ZIP, NPY, EVENTS = "application/json", "application/zip", "application/x-npy", "text/event-stream"

PURE_MEDIA = (PNG, WEBP, JPEG, ZIP, NPY)  # the same request gives the same bytes

LOSSY = {WEBP: "WEBP", JPEG: "JPEG"}  # with Pillow's names

_MAX_ACCEPT = 4096  # characters; browsers send less than 200
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # constant, so that equal images give equal ZIPs

# The cost of encoding a value, as a multiple of the cost in a PNG. Measured with 3x512x512: PNG 8 ns, WebP 37 ns,
# JPEG 2 ns, .npy 0.2 ns. Small JPEGs cost twice as much as small PNGs.
_COST = {WEBP: 5, NPY: 1 / 32}
# How many values of encoded PNGs are packed at the cost of encoding one. Measured: 10 ms and 0.4 ms, beside 25 ms.
PACKING = {JSON: 2, ZIP: 64}


def image_media(served: Served) -> tuple[str, ...]:
    """The media types of one drawn image. The first is for clients without a preference."""
    return tuple(media for media in sample_media(served) if media != ZIP)


def sample_media(served: Served) -> tuple[str, ...]:
    """The media types of /sample. No client gets latents where images are checked."""
    if not served.draws_pictures:
        return (NPY,)
    is_checkable = served.model.vae is None or not served.checks_images
    return (PNG, WEBP, JPEG, JSON, ZIP, *([NPY] if is_checkable else []), EVENTS)


def noise_media(served: Served) -> tuple[str, ...]:
    """The media types of /noise."""
    return (PNG, NPY) if served.draws_pictures else (NPY,)


def negotiate(accept: str, offers: Sequence[str]) -> str:
    """The offered media type that an Accept header prefers. RFC 9110, section 12.5.1.

    Among equal weights, a named type goes before a type that only a wildcard covers; then the earlier offer goes first.
    A client for which a wildcard covers PNG gets no lossy image: browsers name WebP beside `*/*`.

    Raises:
        NotAcceptable: no offer is acceptable, or the header is too long to read. The message names the offers.
    """
    if len(accept) > _MAX_ACCEPT:
        offered = ", ".join(offers)
        raise NotAcceptable(f"Accept has {len(accept)} characters, and may have {_MAX_ACCEPT}; this is {offered}")
    ranges = _media_ranges(accept) or [("*", "*", 1.0)]
    covering = {offer: _covering(offer, ranges) for offer in offers}
    if PNG in offers and covering[PNG].q > 0 and covering[PNG].specificity < _NAMED:
        covering = {offer: covered for offer, covered in covering.items() if offer not in LOSSY}
    best = max(covering, key=lambda offer: (*covering[offer], -offers.index(offer)))
    if covering[best].q == 0:
        raise NotAcceptable(f"this is answered as {', '.join(offers)}, and the request accepts {accept}")
    return best


class _Covered(NamedTuple):
    """The weight of a media type, and how specific the media range is from which the weight comes."""

    q: float
    specificity: int


_NAMED = 2  # the specificity of a type that is named


def _covering(offer: str, ranges: Sequence[tuple[str, str, float]]) -> _Covered:
    kind, subtype = offer.split("/")
    matches = [
        ((range_kind == kind) + (range_subtype == subtype), q)
        for range_kind, range_subtype, q in ranges
        if range_kind in (kind, "*") and range_subtype in (subtype, "*")
    ]
    specificity, q = max(matches, default=(0, 0.0))
    return _Covered(q, specificity)


def _media_ranges(accept: str) -> list[tuple[str, str, float]]:
    ranges = []
    for part in accept.split(","):
        media_range, *parameters = (piece.strip() for piece in part.split(";"))
        kind, slash, subtype = media_range.lower().partition("/")
        if not slash:
            continue
        q = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "q":
                try:
                    q = min(1.0, max(0.0, float(value)))
                except ValueError:
                    q = 0.0
        ranges.append((kind, subtype, q))
    return ranges


# Bodies.


@dataclass(frozen=True, slots=True)
class OneByOne:
    """Each image is encoded as soon as it is done. Implements service.engine.requests.Encoding.

    Attributes:
        encode: an image, by its index, to bytes.
        pack: the bytes of all images to the body.
        values: how many values a call of `encode` encodes, and the call of `pack`.
    """

    encode: Callable[[int, Image], bytes]
    pack: Callable[[Sequence[bytes]], bytes]
    values: tuple[int, int]

    def image(self, index: int, image: Image) -> bytes:
        return self.encode(index, image)

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        return self.pack(encoded)


@dataclass(frozen=True, slots=True)
class _AllAtOnce:
    """All images are encoded together, once the last is done. Implements service.engine.requests.Encoding.

    Attributes:
        encode: all images to the body.
        values: 0, and how many values the call of `encode` encodes.
    """

    encode: Callable[[Sequence[Image]], bytes]
    values: tuple[int, int]

    def image(self, index: int, image: Image) -> bytes:
        return b""

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        return self.encode(images)


class Deep:
    """A 16-bit PNG of one image, for /noise. Implements service.engine.requests.Encoding.

    Args:
        plan: of the request.
        value_range: the values of the PNG stand for −value_range … value_range.
        served: knows the image's shape.

    Attributes:
        clipped: the share of clipped values; None before the encoding.
    """

    def __init__(self, plan: Plan, value_range: float, served: Served) -> None:
        self._value_range = value_range
        self.clipped: float | None = None
        self.values = 2 * math.prod(_shape(plan, served)), 0  # twice as many bytes

    def image(self, index: int, image: Image) -> bytes:
        png, self.clipped = encode_png16(image, self._value_range)
        return png

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        return _only(encoded)


def encoding(plan: Plan, media_type: str, served: Served) -> Encoding:
    """How the images of a plan become the body of an answer of this media type.

    The body of an event stream is empty, because each image has its own event. A JSON body still lacks its timings.

    Raises:
        Invalid: there are too many images for a contact sheet of this media type.
    """
    count, size = len(plan.rows), values_of(plan, media_type, served)

    def png(index: int, image: Image) -> bytes:
        return encode_png(image, plan.recipes[index])

    match media_type:
        case "application/x-npy":
            return _AllAtOnce(_npy, (0, count * size))
        case "image/webp" | "image/jpeg":
            kind = LOSSY[media_type]
            _check_sheet(kind, count, _shape(plan, served))
            return _AllAtOnce(lambda images: encode_lossy(contact_sheet(images), kind), (0, count * size))
        case "image/png" if count > 1:
            return _AllAtOnce(lambda images: encode_png(contact_sheet(images), plan.canonical), (0, count * size))
        case "image/png":
            return OneByOne(png, _only, (size, 0))
        case "application/zip":
            return OneByOne(png, partial(_zip, plan.seeds), (size, count * size // PACKING[media_type]))
        case "application/json":
            return OneByOne(png, partial(_json, plan, served), (size, count * size // PACKING[media_type]))
        case _:
            return OneByOne(png, _nothing, (size, 0))


def values_of(plan: Plan, media_type: str, served: Served) -> int:
    """The values of one image of a plan, at the cost of encoding them as a PNG."""
    return math.ceil(math.prod(_shape(plan, served)) * _COST.get(media_type, 1))


def _check_sheet(kind: str, count: int, shape: tuple[int, int, int]) -> None:
    columns, rows = grid(count)
    width, height = columns * shape[2], rows * shape[1]
    if max(width, height) > MOST_SIDE[kind]:
        raise Invalid.field(
            "num_images",
            f"must make a contact sheet of at most {MOST_SIDE[kind]} pixels a side, the most of a {kind}; "
            f"{count} images make {width}x{height}",
        )


def _shape(plan: Plan, served: Served) -> tuple[int, int, int]:
    """The shape of each result of a plan, [C, H, W]."""
    row = plan.rows[0]
    if row.is_decoded:
        return served.model.image_shape_of(plan.group)
    channels, height, width = served.model.sample_shape_of(plan.group)
    return served.model.out_channels if row.model_output else channels, height, width


def _npy(images: Sequence[Image]) -> bytes:
    """[C, H, W] of one image, [N, C, H, W] of several."""
    return encode_npy(images[0] if len(images) == 1 else np.stack(images))


def _only(encoded: Sequence[bytes]) -> bytes:
    [body] = encoded
    return body


def _nothing(_: Sequence[bytes]) -> bytes:
    return b""


def _zip(seeds: Sequence[int], pngs: Sequence[bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for seed, png in zip(seeds, pngs, strict=True):
            archive.writestr(zipfile.ZipInfo(f"{seed}.png", _ZIP_TIME), png)
    return file.getvalue()


def _json(plan: Plan, served: Served, pngs: Sequence[bytes]) -> bytes:
    images = [
        {"seed": seed, "b64_json": base64.b64encode(png).decode()} for seed, png in zip(plan.seeds, pngs, strict=True)
    ]
    document = {
        "images": images,
        "parameters": plan.parameters,
        "model": {"name": served.model.name, "digest": served.model.digest, "fingerprint": served.fingerprint},
        "warnings": plan.warnings,
    }
    return bytes(JSONResponse(document).body)


def _with_timings(document: bytes, spent: Mapping[str, float]) -> bytes:
    """A JSON object with one more member. The times are known only after the encoding."""
    return document[:-1] + b',"timings":' + bytes(JSONResponse(spent).body) + b"}"


def timings(finished: Finished, served: Served) -> dict[str, float]:
    """The seconds of each part of a request."""
    return {f"{name}_s": round(s, 6) for name, s in _seconds(finished, served).items()}


def _seconds(finished: Finished, served: Served) -> dict[str, float]:
    decoding = {} if served.model.vae is None else {"decode": finished.decode_s}
    return {"queue": finished.queue_s, "denoise": finished.denoise_s, **decoding, "encode": finished.encode_s}


def etag(plan: Plan, media_type: str) -> str:
    """A strong ETag. Two requests share an ETag if one runtime answers them with the same bytes."""
    key = json.dumps([plan.canonical, media_type], sort_keys=True)
    return f'"{hashlib.sha256(key.encode()).hexdigest()[:32]}"'


def matches(if_none_match: str, tag: str) -> bool:
    """Whether an If-None-Match header names the ETag, by weak comparison: RFC 9110, section 13.1.2."""
    named = rf"(?:^|,)\s*+(?:W/)?{re.escape(tag)}"
    return if_none_match.strip() == "*" or re.search(named, if_none_match) is not None


def headers_of(plan: Plan) -> dict[str, str]:
    """The headers that a plan alone decides. Warnings are one line of ASCII."""
    warnings = {"X-Warnings": "; ".join(plan.warnings)} if plan.warnings else {}
    return {"X-Seed": str(plan.seeds[0]), **warnings}


def respond(plan: Plan, finished: Finished, media_type: str, served: Served, headers: Mapping[str, str]) -> Response:
    """The answer, with headers for its seed and its times."""
    body = finished.body
    if media_type == JSON:
        body = _with_timings(body, timings(finished, served))
    return Response(
        body, headers={**headers_of(plan), **server_timing(finished, served), **headers}, media_type=media_type
    )


def server_timing(finished: Finished, served: Served) -> dict[str, str]:
    """The header with the milliseconds of each part of a request."""
    timing = _seconds(finished, served)
    return {"Server-Timing": ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in timing.items())}
