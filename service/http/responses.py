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

from starlette.responses import JSONResponse, Response

from model.description import ModelDescription
from model.rows import Image
from service.engine.requests import Encoding, Finished
from service.errors import NotAcceptable
from service.http.codecs import contact_sheet, encode_npy, encode_png
from service.plan.plan import Plan
from service.plan.served import Served

PNG, JSON, ZIP, NPY = "image/png", "application/json", "application/zip", "application/x-npy"
EVENTS = "text/event-stream"

_MAX_ACCEPT = 4096  # characters; browsers send less than 200
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # constant, so that equal images give equal ZIPs


def negotiate(accept: str, offers: Sequence[str]) -> str:
    """The offered media type that an Accept header prefers. RFC 9110, section 12.5.1.

    Among equal weights, a named type goes before a type that only a wildcard covers, then the earlier offer goes first.

    Raises:
        NotAcceptable: no offer is acceptable, or the header is too long to read. The message names the offers.
    """
    if len(accept) > _MAX_ACCEPT:
        offered = ", ".join(offers)
        raise NotAcceptable(f"Accept has {len(accept)} characters, and may have {_MAX_ACCEPT}; this is {offered}")
    ranges = _media_ranges(accept) or [("*", "*", 1.0)]
    best: tuple[float, int, int] = (0.0, 0, 0)
    chosen = None
    for place, offer in enumerate(offers):
        kind, subtype = offer.split("/")
        matches = [
            (specificity, q)
            for range_kind, range_subtype, q in ranges
            for specificity in [(range_kind == kind) + (range_subtype == subtype)]
            if range_kind in (kind, "*") and range_subtype in (subtype, "*")
        ]
        if matches:
            specificity, q = max(matches)
            if q > 0 and (q, specificity, -place) > best:
                best, chosen = (q, specificity, -place), offer
    if chosen is None:
        raise NotAcceptable(f"this is answered as {', '.join(offers)}, and the request accepts {accept}")
    return chosen


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
class _OneByOne:
    """Each image is encoded as soon as it is done. Implements service.engine.requests.Encoding.

    Attributes:
        encode: an image, by its index, to bytes.
        pack: the bytes of all images to the body.
        size: values of an image.
    """

    encode: Callable[[int, Image], bytes]
    pack: Callable[[Sequence[bytes]], bytes]
    size: int

    def image(self, index: int, image: Image) -> bytes:
        return self.encode(index, image)

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        return self.pack(encoded)

    @property
    def values(self) -> tuple[int, int]:
        return self.size, 0


@dataclass(frozen=True, slots=True)
class _AllAtOnce:
    """All images are encoded together, once the last is done. Implements service.engine.requests.Encoding.

    Attributes:
        encode: all images to the body.
        size: values of all images.
    """

    encode: Callable[[Sequence[Image]], bytes]
    size: int

    def image(self, index: int, image: Image) -> bytes:
        return b""

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        return self.encode(images)

    @property
    def values(self) -> tuple[int, int]:
        return 0, self.size


def encoding(plan: Plan, media_type: str, served: Served) -> Encoding:
    """How the images of a plan become the body of an answer of this media type.

    The body of an event stream is empty: the bytes of each image are that image's event. JSON still lacks its timings.
    """
    count, size = len(plan.rows), math.prod(_shape(plan, served.model))

    def png(index: int, image: Image) -> bytes:
        return encode_png(image, plan.recipes[index])

    match media_type:
        case "application/x-npy":
            return _AllAtOnce(lambda images: encode_npy(images[0]), size)
        case "image/png" if count > 1:
            return _AllAtOnce(lambda images: encode_png(contact_sheet(images), plan.canonical), count * size)
        case "image/png":
            return _OneByOne(png, _only, size)
        case "application/zip":
            return _OneByOne(png, partial(_zip, plan.seeds), size)
        case "application/json":
            return _OneByOne(png, partial(_json, plan, served), size)
        case _:
            return _OneByOne(png, _nothing, size)


def _shape(plan: Plan, model: ModelDescription) -> tuple[int, int, int]:
    """The shape of each result of a plan, [C, H, W]."""
    row = plan.rows[0]
    if row.is_decoded:
        return model.image_shape
    channels, height, width = model.sample_shape
    return model.out_channels if row.model_output else channels, height, width


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


def respond(plan: Plan, finished: Finished, media_type: str, served: Served, headers: Mapping[str, str]) -> Response:
    """The answer, with headers for its seed and its times."""
    body = finished.body
    if media_type == JSON:
        body = _with_timings(body, timings(finished, served))
    timing = _seconds(finished, served)
    return Response(
        body,
        headers={
            "X-Seed": str(plan.seeds[0]),
            "Server-Timing": ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in timing.items()),
            **headers,
        },
        media_type=media_type,
    )
