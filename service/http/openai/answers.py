"""Finished images → the bodies of OpenAI's Images API."""

import base64
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from model.rows import Image
from service.engine.requests import Encoding
from service.http.formats import QUALITY, encode_lossy
from service.http.openai.fields import Asked
from service.http.png import encode_png
from service.http.responses import JSON, LOSSY, PACKING, OneByOne, values_of
from service.plan.plan import Plan
from service.plan.served import Served
from service.plan.texts import read_by


def output_format(media_type: str) -> str:
    """A media type as OpenAI's API calls it."""
    return media_type.removeprefix("image/")


def encoded(asked: Asked, image: Image, recipe: dict[str, object]) -> bytes:
    """One image in the format that is asked for, in base64. Only PNGs carry the recipe."""
    kind = LOSSY.get(asked.media_type)
    if kind is None:
        return base64.b64encode(encode_png(image, recipe))
    return base64.b64encode(encode_lossy(image, kind, QUALITY if asked.quality is None else asked.quality))


def each(plan: Plan, asked: Asked, served: Served) -> Encoding:
    """Each image in base64, for an event of its own."""
    return OneByOne(partial(_image, plan, asked), _nothing, (values_of(plan, asked.media_type, served), 0))


def whole(plan: Plan, asked: Asked, served: Served, links: Sequence[str | None]) -> Encoding:
    """The JSON of all images.

    Args:
        links: the address of each image. Images without an address are answered in base64: where addresses are asked
            for, as `data:` URLs.
    """

    def image(index: int, image: Image) -> bytes:
        return b"" if links[index] else _image(plan, asked, index, image)

    size = 0 if all(links) else values_of(plan, asked.media_type, served)
    costs = size, len(links) * size // PACKING[JSON]
    return OneByOne(image, partial(_json, plan, asked, _usage_of_all(plan, served), links), costs)


def usage(read: int) -> dict[str, Any]:
    """The tokens of an answer. Images have none here.

    Args:
        read: tokens of prompts that the text encoders read.
    """
    return {
        "input_tokens": read,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": read},
        "output_tokens": 0,
        "total_tokens": read,
    }


def _usage_of_all(plan: Plan, served: Served) -> dict[str, Any]:
    """The usage of all images. A prompt that several images share counts once."""
    counts = {row.branches[0].text: count for row, count in zip(plan.rows, read_by(plan.rows, served), strict=True)}
    return usage(sum(counts.values()))


def _image(plan: Plan, asked: Asked, index: int, image: Image) -> bytes:
    return encoded(asked, image, plan.recipes[index])


def _nothing(_: Sequence[bytes]) -> bytes:
    return b""


def _json(
    plan: Plan, asked: Asked, usage: dict[str, Any], links: Sequence[str | None], encoded: Sequence[bytes]
) -> bytes:
    data = []
    for seed, link, image in zip(plan.seeds, links, encoded, strict=True):
        text = image.decode()
        shown = {"url": link or f"data:{asked.media_type};base64,{text}"} if asked.by_url else {"b64_json": text}
        data.append({**shown, "seed": seed})
    document = {
        "created": int(time.time()),
        "data": data,
        "output_format": output_format(asked.media_type),
        "size": str(plan.group),
        "usage": usage,
        "warnings": plan.warnings,
    }
    return json.dumps(document, separators=(",", ":")).encode()
