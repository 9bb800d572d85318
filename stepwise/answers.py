"""Parses answers.

If an answer is not as in docs/api.md, each function raises the parser's own error, of any kind.
"""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import httpx
import numpy as np

from stepwise.recipe import PNG_MAGIC
from stepwise.results import Drawn, DrawnArray, Float32, Image, Info, Noisy, NoisyArray, Picture
from stepwise.shapes import checked


class _Image(TypedDict):
    seed: int
    b64_json: str


class _Drawn(TypedDict):
    images: list[_Image]
    parameters: dict[str, Any]
    timings: dict[str, float]
    model: dict[str, str]
    warnings: NotRequired[list[str]]


def read_info(_: httpx.Headers, body: bytes) -> Info:
    document: Info = checked(json.loads(body), Info)
    return document


def read_drawn(_: httpx.Headers, body: bytes) -> Drawn:
    document: _Drawn = checked(json.loads(body), _Drawn)
    images = [Image(image["seed"], base64.b64decode(image["b64_json"], validate=True)) for image in document["images"]]
    if not images:
        raise ValueError("it has no images")
    warnings = tuple(document.get("warnings", ()))
    return Drawn(tuple(images), document["parameters"], document["timings"], document["model"], warnings)


def read_drawn_array(headers: httpx.Headers, body: bytes) -> DrawnArray:
    return DrawnArray(read_npy(body, (3, 4)), int(headers["x-seed"]), _warnings(headers))


def read_picture(headers: httpx.Headers, body: bytes) -> Picture:
    if not body.startswith((b"RIFF", b"\xff\xd8")):
        raise ValueError("it is neither a WebP nor a JPEG")
    return Picture(body, int(headers["x-seed"]), _warnings(headers))


def _warnings(headers: httpx.Headers) -> tuple[str, ...]:
    text = headers.get("x-warnings", "")
    return tuple(text.split("; ")) if text else ()


def read_noisy(headers: httpx.Headers, body: bytes) -> Noisy:
    if not body.startswith(PNG_MAGIC):
        raise ValueError("it is no PNG")
    return Noisy(body, int(headers["x-seed"]), float(headers["x-clipped"]))


def read_noisy_array(headers: httpx.Headers, body: bytes) -> NoisyArray:
    return NoisyArray(read_npy(body), int(headers["x-seed"]))


def read_npy(body: bytes, dimensions: Sequence[int] = (3,)) -> Float32:
    array: Float32 = np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
    if array.dtype != np.float32 or array.ndim not in dimensions:
        raise ValueError(f"it is an array of {array.dtype} with the shape {list(array.shape)}")
    return array
