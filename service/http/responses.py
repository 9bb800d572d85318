"""Turns finished images into answers: media type, bytes and headers."""

import base64
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from service.engine.requests import Clock, Finished
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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A body, ready to send, and the seconds of its encoding."""

    body: bytes
    media_type: str
    encode_s: float


def encode(plan: Plan, finished: Finished, media_type: str, served: Served, clock: Clock) -> Encoded:
    """Encode a plan's images as `media_type`: PNG, JSON, ZIP or NPY."""
    began = clock()
    match media_type:
        case "application/x-npy":
            body = encode_npy(finished.images[0])
        case "image/png" if len(finished.images) > 1:
            body = encode_png(contact_sheet(finished.images), plan.canonical)
        case _:
            pngs = [encode_png(x, recipe) for x, recipe in zip(finished.images, plan.recipes, strict=True)]
            if media_type == PNG:
                [body] = pngs
            elif media_type == ZIP:
                body = _zip(plan.seeds, pngs)
            else:
                body = _json(plan, pngs, finished, served, clock() - began)
    return Encoded(body, media_type, clock() - began)


def _zip(seeds: Sequence[int], pngs: Sequence[bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for seed, png in zip(seeds, pngs, strict=True):
            archive.writestr(zipfile.ZipInfo(f"{seed}.png", _ZIP_TIME), png)
    return file.getvalue()


def _json(plan: Plan, pngs: Sequence[bytes], finished: Finished, served: Served, encode_s: float) -> bytes:
    images = [
        {"seed": seed, "b64_json": base64.b64encode(png).decode()} for seed, png in zip(plan.seeds, pngs, strict=True)
    ]
    document = {
        "images": images,
        "parameters": plan.parameters,
        "model": {"name": served.model.name, "digest": served.model.digest, "fingerprint": served.fingerprint},
        "timings": timings(finished, encode_s, served),
    }
    return bytes(JSONResponse(document).body)


def timings(finished: Finished, encode_s: float, served: Served) -> dict[str, float]:
    """The seconds of each part of a request."""
    return {f"{name}_s": round(s, 6) for name, s in _seconds(finished, encode_s, served).items()}


def _seconds(finished: Finished, encode_s: float, served: Served) -> dict[str, float]:
    decoding = {} if served.model.vae is None else {"decode": finished.decode_s}
    return {"queue": finished.queue_s, "denoise": finished.denoise_s, **decoding, "encode": encode_s}


def etag(plan: Plan, media_type: str) -> str:
    """A strong ETag. Two requests share an ETag if one runtime answers them with the same bytes."""
    key = json.dumps([plan.canonical, media_type], sort_keys=True)
    return f'"{hashlib.sha256(key.encode()).hexdigest()[:32]}"'


def matches(if_none_match: str, tag: str) -> bool:
    """Whether an If-None-Match header names the ETag, by weak comparison: RFC 9110, section 13.1.2."""
    named = rf"(?:^|,)\s*+(?:W/)?{re.escape(tag)}"
    return if_none_match.strip() == "*" or re.search(named, if_none_match) is not None


def respond(plan: Plan, finished: Finished, encoded: Encoded, served: Served, headers: Mapping[str, str]) -> Response:
    """The answer, with headers for its seed and its times."""
    timing = _seconds(finished, encoded.encode_s, served)
    return Response(
        encoded.body,
        headers={
            "X-Seed": str(plan.seeds[0]),
            "Server-Timing": ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in timing.items()),
            **headers,
        },
        media_type=encoded.media_type,
    )
